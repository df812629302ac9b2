"""A world of moving shapes: clips made on the spot, each with a caption and the exact position of everything in it.

One or two shapes of different colours move by one of the laws of `laws.py` over a dark ground. Clip n is a function of
(seed, n) and of the arguments. Lengths are in widths of the picture (heights, where that is less), times in seconds.
"""

import csv
import json
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from tfm_jax import video
from tfm_jax.errors import InputError
from tfm_jax.moving_shapes import laws

SHAPES = ("disc", "square", "triangle")
COLOURS = {
    "red": (232, 44, 40),
    "green": (44, 190, 76),
    "blue": (54, 96, 240),
    "yellow": (236, 208, 36),
    "purple": (206, 60, 214),
    "white": (236, 236, 236),
}
GROUNDS = {
    "black": ((14, 14, 16), (14, 14, 16)),
    "grey": ((50, 50, 54), (50, 50, 54)),
    "navy": ((16, 22, 56), (16, 22, 56)),
    "shaded": ((60, 54, 58), (12, 12, 14)),
}
"""Colour at the top and at the bottom of the picture, evenly mixed in between."""

DIRECTIONS = {
    "right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1),
    "up and right": (1, -1), "up and left": (-1, -1), "down and right": (1, 1), "down and left": (-1, 1),
}  # fmt: skip
SIDEWAYS = ("right", "left")
TURNS = {"clockwise": 1, "counterclockwise": -1}

SPEEDS = {"slowly": (0.20, 0.34), "fast": (0.46, 0.65)}
"""Speeds at the start of a clip, widths a second."""
HELD_OUT_SPEEDS = {"slowly": (0.34, 0.40), "fast": (0.40, 0.46)}
"""Drawn only where it is asked for, to see what a model does between the speeds it was trained on."""

LAWS = {
    "still": "stands still",
    "uniform": "moves",
    "bouncing": "bounces off the walls, first",
    "gravity": "falls and bounces off the floor, drifting",
    "orbit": "circles",
    "collision": "moves",
}
"""Law -> what its captions say."""
COLLIDES = ", and collides with "

COUNTS = {"collision": 2, "gravity": 1}
"""Objects of a law that needs so many: two that fall and drift hardly pass each other."""

RADIUS = 0.14
"""Half the size of a shape; the walls are met at this distance from the edge of the picture."""
GRAVITY = 3.0
"""Widths a second squared: a fall from the ceiling takes 0.7 seconds."""
HEIGHTS = (0.5, 1.0)
"""Where a fall begins, as a share of the room between floor and ceiling."""
ORBITS = (0.20, 0.34)
"""Radius of an orbit."""
TURNING = (0.25, 0.75)
"""Share of the clip after which a wall or another body is met first: there is a before and an after."""
IMPACT = 0.3
"""Least speed, widths a second, at which two bodies close along the line of their centres: less is hardly seen."""
CLEARANCE = 2.6
"""Radii that the centres of two objects keep apart where they do not collide: no shape covers another."""
ATTEMPTS = 10_000


class Body(NamedTuple):
    """What a caption says of one object."""

    colour: str
    shape: str
    direction: str
    """Of DIRECTIONS at the start of the clip, or of TURNS; empty where the object stands still."""
    pace: str
    """Of SPEEDS; empty where the object stands still."""


class Scene(NamedTuple):
    """A clip and what is exactly true of it."""

    pixels: UInt8[np.ndarray, "t y x 3"]
    caption: str
    law: str
    ground: str
    bodies: tuple[Body, ...]
    speeds: tuple[float, ...]
    """Drawn speed of every object, widths a second; sideways under gravity, before the contact in a collision."""
    positions: Float[np.ndarray, "n t 2"]
    """Centre (x, y) of every object in every frame, in pixels from the upper left corner of the picture."""


class Stage(NamedTuple):
    """The picture and the clock."""

    frames: int
    size: tuple[int, int]
    """Height and width in pixels."""
    fps: float | int

    @property
    def width(self) -> int:
        """Pixels of what is called a width."""
        return min(self.size)

    @property
    def radius(self) -> float:
        """Pixels."""
        return RADIUS * self.width

    @property
    def room(self) -> Float[np.ndarray, "2"]:
        """Pixels between the walls, for the centre of an object, along x and y."""
        return np.array([self.size[1], self.size[0]]) - 2 * self.radius

    @property
    def gravity(self) -> float:
        """Pixels a frame squared."""
        return GRAVITY * self.width / self.fps**2

    @property
    def times(self) -> Float[np.ndarray, "t"]:
        return np.arange(float(self.frames))


# --- Clips -----------------------------------------------------------------------------------------------------------


def write_clips(
    folder: Path,
    count: int,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    fps: float | int = 16,
    seed: int = 0,
    laws: Sequence[str] = tuple(LAWS),
    objects: Sequence[int] = (1, 2),
    held_out: bool = False,
) -> None:
    """Write `count` mp4 files, metadata.csv (columns video, prompt) and states.json into `folder`.

    states.json holds, by file name, the scenes without their pixels. `make_clip` says what the arguments mean.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, states = [], []
    for number in range(count):
        scene = make_clip(np.random.default_rng((seed, number)), frames, size, fps, laws, objects, held_out)
        name = f"{number:04d}.mp4"
        video.write_clip(folder / name, scene.pixels, fps)
        rows.append((name, scene.caption))
        states.append(f"{json.dumps(name)}: {json.dumps(_state(scene))}")
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("video", "prompt"), *rows])
    (folder / "states.json").write_text("{\n" + ",\n".join(states) + "\n}\n", encoding="utf-8")


def _state(scene: Scene) -> dict[str, Any]:
    objects = [
        {**body._asdict(), "speed": round(speed, 4), "positions": positions.round(3).tolist()}
        for body, speed, positions in zip(scene.bodies, scene.speeds, scene.positions, strict=True)
    ]
    return {"law": scene.law, "ground": scene.ground, "objects": objects}


def make_clip(
    rng: np.random.Generator,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    fps: float | int = 16,
    laws: Sequence[str] = tuple(LAWS),
    objects: Sequence[int] = (1, 2),
    held_out: bool = False,
) -> Scene:
    """A scene drawn at random.

    Args:
        size: height and width in pixels.
        laws: names in LAWS; one of them is drawn.
        objects: how many objects there may be, where the law leaves it open (COUNTS).
        held_out: draw speeds from HELD_OUT_SPEEDS, never drawn otherwise, in place of SPEEDS.

    Raises:
        InputError: the clip is so long that the motion does not fit into the picture.
    """
    stage = Stage(frames, size, fps)
    law = str(rng.choice(list(laws)))
    count = COUNTS.get(law) or int(rng.choice(list(objects)))
    colours = [str(colour) for colour in rng.choice(list(COLOURS), size=count, replace=False)]
    shapes = ["disc" if law == "collision" else str(shape) for shape in rng.choice(SHAPES, size=count)]
    ground = str(rng.choice(list(GROUNDS)))
    motions, positions = _move(rng, law, count, stage, HELD_OUT_SPEEDS if held_out else SPEEDS)
    bodies = tuple(
        Body(colour, shape, motion.direction, motion.pace)
        for colour, shape, motion in zip(colours, shapes, motions, strict=True)
    )
    positions = positions + stage.radius
    pixels = draw(bodies, positions, ground, stage)
    speeds = tuple(motion.speed for motion in motions)
    return Scene(pixels, write_caption(law, bodies, ground), law, ground, bodies, speeds, positions)


# --- Captions --------------------------------------------------------------------------------------------------------


def write_caption(law: str, bodies: Sequence[Body], ground: str) -> str:
    """Such as "a red disc moves up and left, fast, on a navy ground"."""
    texts = [f"a {body.colour} {body.shape} {_clause(law, body)}" for body in bodies]
    if law == "collision":
        first, second = texts
        text = first + COLLIDES + second.replace(LAWS[law], f"that {LAWS[law]}", 1)
    else:
        text = ", and ".join(texts)
    return f"{text}, on a {ground} ground"


def _clause(law: str, body: Body) -> str:
    return f"{LAWS[law]} {body.direction}, {body.pace}" if body.direction else LAWS[law]


def _any(names: Sequence[str]) -> str:
    """A pattern for one of the names, the longest that fits."""
    return "(" + "|".join(sorted(names, key=len, reverse=True)) + ")"


_BODY = re.compile(
    f"a {_any(list(COLOURS))} {_any(SHAPES)} (?:that )?{_any(list(dict.fromkeys(LAWS.values())))}"
    f"(?: {_any([*DIRECTIONS, *TURNS])}, {_any(list(SPEEDS))})?"
)


def read_caption(caption: str) -> tuple[str, tuple[Body, ...]] | None:
    """Law and objects of a caption of this world; None for any other text."""
    found = _BODY.findall(caption)
    if not found:
        return None
    law = "collision" if COLLIDES in caption else next(law for law in LAWS if LAWS[law] == found[0][2])
    return law, tuple(Body(colour, shape, direction, pace) for colour, shape, _, direction, pace in found)


# --- Motion ----------------------------------------------------------------------------------------------------------


class _Motion(NamedTuple):
    direction: str
    pace: str
    speed: float
    """Widths a second."""


Speeds = dict[str, tuple[float, float]]


def _move(
    rng: np.random.Generator, law: str, count: int, stage: Stage, speeds: Speeds
) -> tuple[list[_Motion], Float[np.ndarray, "n t 2"]]:
    """Drawn again and again until the objects keep inside the walls and, unless they collide, clear of each other."""
    for _ in range(ATTEMPTS):
        motions = [_draw_motion(rng, law, speeds) for _ in range(count)]
        if law == "collision":
            positions = _collision(rng, stage, motions)
            if (positions >= 0).all() and (positions <= stage.room).all():
                return motions, positions
        else:
            positions = np.stack([PATHS[law](rng, stage, motion) for motion in motions])
            pairs = combinations(positions, 2)
            if all(np.linalg.norm(a - b, axis=-1).min() > CLEARANCE * stage.radius for a, b in pairs):
                return motions, positions
    raise _too_long(stage, f"{law} of {count} objects")


def _too_long(stage: Stage, what: str) -> InputError:
    clip = f"{stage.frames} frames of {stage.size[0]} x {stage.size[1]} pixels at {stage.fps} fps"
    return InputError(f"{clip}: {what} does not fit into the picture; expected a shorter clip, about a second")


def _draw_motion(rng: np.random.Generator, law: str, speeds: Speeds) -> _Motion:
    if law == "still":
        return _Motion("", "", 0.0)
    names = {"gravity": SIDEWAYS, "orbit": tuple(TURNS)}.get(law, tuple(DIRECTIONS))
    pace = str(rng.choice(list(speeds)))
    return _Motion(str(rng.choice(names)), pace, float(rng.uniform(*speeds[pace])))


def _velocity(stage: Stage, motion: _Motion) -> Float[np.ndarray, "2"]:
    """Pixels a frame."""
    direction = np.array(DIRECTIONS[motion.direction])
    return direction / np.linalg.norm(direction) * motion.speed * stage.width / stage.fps


def _start(rng: np.random.Generator, stage: Stage, way: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
    """A place from which a way (pixels along x and y) can be gone without meeting a wall."""
    free = stage.room - abs(way)
    if (free < 0).any():
        raise _too_long(stage, f"a way of {abs(way).max():.0f} pixels")
    start = rng.uniform(size=2) * free
    return np.where(way < 0, stage.room - start, start)


def _still(rng: np.random.Generator, stage: Stage, motion: _Motion) -> Float[np.ndarray, "t 2"]:
    return np.tile(_start(rng, stage, np.zeros(2)), (stage.frames, 1))


def _uniform(rng: np.random.Generator, stage: Stage, motion: _Motion) -> Float[np.ndarray, "t 2"]:
    velocity = _velocity(stage, motion)
    start = _start(rng, stage, velocity * stage.times[-1])
    return laws.line(start, velocity, stage.times[:, None])


def _bouncing(rng: np.random.Generator, stage: Stage, motion: _Motion) -> Float[np.ndarray, "t 2"]:
    """The start is so far from a wall of the direction of motion that it is met at a time of TURNING."""
    velocity = _velocity(stage, motion)
    moving = np.flatnonzero(velocity)
    contact = rng.uniform(*TURNING) * min(stage.times[-1], (stage.room / abs(velocity).clip(1e-9)).min())
    start = _start(rng, stage, velocity * contact)
    axis = rng.choice(moving)
    start[axis] = (stage.room[axis] if velocity[axis] > 0 else 0) - velocity[axis] * contact
    return laws.fold(laws.line(start, velocity, stage.times[:, None]), stage.room)


def _gravity(rng: np.random.Generator, stage: Stage, motion: _Motion) -> Float[np.ndarray, "t 2"]:
    velocity = _velocity(stage, motion)
    x = laws.line(_start(rng, stage, velocity * stage.times[-1])[0], velocity[0], stage.times)
    floor = stage.room[1]
    return np.stack([x, floor - laws.hop(rng.uniform(*HEIGHTS) * floor, 0.0, stage.times, stage.gravity)], -1)


def _orbit(rng: np.random.Generator, stage: Stage, motion: _Motion) -> Float[np.ndarray, "t 2"]:
    radius = rng.uniform(*ORBITS) * stage.width
    centre = radius + rng.uniform(size=2) * (stage.room - 2 * radius)
    angle = rng.uniform(0, 2 * np.pi)
    turn = TURNS[motion.direction] * motion.speed * stage.width / stage.fps / radius
    return laws.circle(centre, radius * np.array([np.cos(angle), np.sin(angle)]), turn, stage.times)


PATHS: dict[str, Callable[[np.random.Generator, Stage, _Motion], Float[np.ndarray, "t 2"]]] = {
    "still": _still, "uniform": _uniform, "bouncing": _bouncing, "gravity": _gravity, "orbit": _orbit,
}  # fmt: skip


def _collision(rng: np.random.Generator, stage: Stage, motions: Sequence[_Motion]) -> Float[np.ndarray, "2 t 2"]:
    """Drawn at the contact and followed back to the start; far outside where the two would hardly collide."""
    velocities = np.stack([_velocity(stage, motion) for motion in motions])
    angle = rng.uniform(0, 2 * np.pi)
    normal = np.array([np.cos(angle), np.sin(angle)])
    middle = rng.uniform(size=2) * stage.room
    contact = rng.uniform(*TURNING) * stage.times[-1]
    if (velocities[0] - velocities[1]) @ normal < IMPACT * stage.width / stage.fps:
        return np.full((2, stage.frames, 2), np.inf)
    starts = middle + np.stack([-normal, normal]) * stage.radius - velocities * contact
    return laws.collide(starts, velocities, stage.times, 2 * stage.radius)


# --- Pictures --------------------------------------------------------------------------------------------------------


def draw(
    bodies: Sequence[Body], positions: Float[np.ndarray, "n t 2"], ground: str, stage: Stage
) -> UInt8[np.ndarray, "t y x 3"]:
    """Every frame: the ground, and over it one body after the other, mixed in by the share of each pixel it covers."""
    height, width = stage.size
    canvas = np.broadcast_to(paint_ground(ground, height), (stage.frames, height, width, 3))
    for body, centres in zip(bodies, positions, strict=True):
        cover = coverage(body.shape, centres, stage)[..., None]
        canvas = canvas + cover * (np.array(COLOURS[body.colour]) - canvas)
    return np.round(canvas).astype(np.uint8)


def paint_ground(ground: str, height: int) -> Float[np.ndarray, "y 1 3"]:
    """Colour of every row."""
    top, bottom = (np.array(colour, np.float64) for colour in GROUNDS[ground])
    return (top + np.linspace(0, 1, height)[:, None] * (bottom - top))[:, None]


def coverage(shape: str, centres: Float[np.ndarray, "t 2"], stage: Stage) -> Float[np.ndarray, "t y x"]:
    """Share of each pixel that a shape covers. It reaches at most a radius along x and y from its centre of mass."""
    height, width = stage.size
    r = stage.radius
    x = np.arange(width) + 0.5 - centres[:, 0, None, None]
    y = np.arange(height)[:, None] + 0.5 - centres[:, 1, None, None]
    if shape == "disc":
        return (r - np.hypot(x, y) + 0.5).clip(0, 1)
    if shape == "square":  # as large as the disc
        half = r * np.sqrt(np.pi) / 2
        return (half - abs(x) + 0.5).clip(0, 1) * (half - abs(y) + 0.5).clip(0, 1)
    sides = (r + y - 1.5 * abs(x)) / np.hypot(1, 1.5)  # corners at (0, -r) and (+-r, r / 2)
    return (np.minimum(sides, r / 2 - y) + 0.5).clip(0, 1)
