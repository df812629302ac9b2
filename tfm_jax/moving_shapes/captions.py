"""Writes and reads the captions of the world of moving shapes."""

import re
from collections.abc import Sequence

from tfm_jax.moving_shapes.scene import (
    COLLISION_CLAUSE,
    COLOURS,
    DIRECTIONS,
    LAWS,
    ROTATIONS,
    SHAPES,
    SPEEDS,
    SceneObject,
)


def write_caption(law: str, objects: Sequence[SceneObject], background: str) -> str:
    """Return a caption such as "a red disc moves up and left, fast, on a navy ground"."""
    texts = [f"a {obj.colour} {obj.shape} {_clause(law, obj)}" for obj in objects]
    if law == "collision":
        first, second = texts
        text = first + COLLISION_CLAUSE + second.replace(LAWS[law], f"that {LAWS[law]}", 1)
    else:
        text = ", and ".join(texts)
    return f"{text}, on a {background} ground"


def _clause(law: str, obj: SceneObject) -> str:
    return f"{LAWS[law]} {obj.direction}, {obj.pace}" if obj.direction else LAWS[law]


def _any_of(names: Sequence[str]) -> str:
    """Return a pattern that matches any of the names, preferring the longest."""
    return "(" + "|".join(sorted(names, key=len, reverse=True)) + ")"


_OBJECT = re.compile(
    f"a {_any_of(list(COLOURS))} {_any_of(SHAPES)} (?:that )?{_any_of(list(dict.fromkeys(LAWS.values())))}"
    f"(?: {_any_of([*DIRECTIONS, *ROTATIONS])}, {_any_of(list(SPEEDS))})?"
)


def read_caption(caption: str) -> tuple[str, tuple[SceneObject, ...]] | None:
    """Return the law and the objects that a caption describes; None if it describes no object of this world."""
    found = _OBJECT.findall(caption)
    if not found:
        return None
    law = "collision" if COLLISION_CLAUSE in caption else next(law for law in LAWS if LAWS[law] == found[0][2])
    return law, tuple(SceneObject(colour, shape, direction, pace) for colour, shape, _, direction, pace in found)
