"""Computes the metrics of a single clip."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tfm_jax.moving_shapes.captions import read_caption
from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.evaluation.metrics import count_changes, measure_motion, variation
from tfm_jax.moving_shapes.evaluation.physics import residual
from tfm_jax.moving_shapes.evaluation.tracking import Pixels, Track, track
from tfm_jax.moving_shapes.scene import DIRECTIONS, ROTATIONS, ClipSpec, SceneObject


class ClipMetrics(NamedTuple):
    """The metrics of one clip. An object is lost if some frame does not show it."""

    residual: float
    """In pixels; infinite if an object is lost."""
    speed: float
    """NaN if an object is lost."""
    roughness: float
    """NaN if an object is lost."""
    variation: float
    """Mean over the objects; NaN if none is found."""
    whole: float
    """1 if every frame shows the expected number of objects, each in one piece; else 0."""
    colours: float
    shapes: float
    directions: float
    """Colours, shapes and directions are 1 if they agree with the caption, else 0; NaN without a caption. If an object
    is lost, shapes and directions are 0."""
    features: Float[np.ndarray, "n d"]
    """See `Motion.features`; no rows if an object is lost."""
    changes: Int[np.ndarray, "256"]
    """See `count_changes`."""


def measure_clip(clip: Pixels, caption: str | None, fps: float | int) -> ClipMetrics:
    """Measure one clip.

    Without a caption of this world, the objects that are found are taken to be the expected ones (at least one is
    expected), and their law is taken to be bouncing.
    """
    spec = ClipSpec(len(clip), clip.shape[1:3], fps)
    law, objects = (read_caption(caption) if caption else None) or ("bouncing", ())
    found = track(clip)
    tracks = match_tracks(found, objects) if objects else found
    expected = len(objects) or max(1, len(found))
    centres = np.full((expected, len(clip), 2), np.nan)
    for number, t in enumerate(tracks):
        centres[number] = t.centres
    motion = measure_motion(centres)
    missing = not np.isfinite(centres).all()
    pairs = list(zip(tracks, objects, strict=False))
    return ClipMetrics(
        residual=np.inf if missing else residual(law, centres, spec),
        speed=motion.speed,
        roughness=motion.roughness,
        variation=float(np.mean([variation(t.mass) for t in tracks])) if tracks else np.nan,
        whole=float(len(found) == expected and all((t.parts == 1).all() for t in found)),
        colours=float({t.colour for t in found} == {o.colour for o in objects}) if objects else np.nan,
        shapes=float(not missing and all(t.shape == o.shape for t, o in pairs)) if objects else np.nan,
        directions=float(not missing and all(moves_in_direction(t.centres, law, o.direction) for t, o in pairs))
        if objects
        else np.nan,
        features=np.zeros((0, motion.features.shape[1])) if missing else motion.features,
        changes=count_changes(clip),
    )


def match_tracks(found: Sequence[Track], objects: Sequence[SceneObject]) -> list[Track]:
    """Return one track for each object, as long as there are enough.

    An object gets the track of its own colour or, if there is none, the largest unused track of a colour that no object
    has.
    """
    by_colour = {t.colour: t for t in found}
    wanted = {obj.colour for obj in objects}
    others = iter([t for t in found if t.colour not in wanted])
    matched = [by_colour.get(obj.colour) or next(others, None) for obj in objects]
    return [t for t in matched if t is not None]


def moves_in_direction(centres: Float[np.ndarray, "t 2"], law: str, direction: str) -> bool:
    """Whether an object moves in the direction that its caption gives or, if it gives none, stands still.

    Uniform motion, orbits and, under gravity, horizontal motion are judged over the whole clip. Bouncing and colliding
    objects are judged over the first quarter of the clip, before the contact. An object that turns back is judged by
    the change of its velocity from the last quarter to the first.
    """
    steps = np.diff(centres, axis=0)
    if not direction:
        return bool(np.linalg.norm(steps, axis=-1).mean() < thresholds.MOVING)
    if direction in ROTATIONS:
        before, after = steps[:-1], steps[1:]
        turn = (before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]).sum()
        return bool(np.linalg.norm(steps, axis=-1).mean() > thresholds.MOVING and turn * ROTATIONS[direction] > 0)
    quarter = max(1, len(steps) // 4)
    if law == "returning":
        steps = steps[:quarter] - steps[-quarter:]
    if law in ("bouncing", "collision"):
        steps = steps[:quarter]
    mean, wanted = steps.mean(0), np.array(DIRECTIONS[direction])
    if law == "gravity":
        mean = mean * [1, 0]
    length = np.linalg.norm(mean)
    cosine = mean @ wanted / max(length, 1e-9) / np.linalg.norm(wanted)
    return bool(length > thresholds.MOVING and cosine > np.cos(np.radians(thresholds.SECTOR)))
