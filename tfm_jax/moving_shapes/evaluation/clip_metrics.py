"""Everything that is measured on one clip."""

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
    """The metrics of one clip.

    A metric is NaN if it needs a caption and there is none, or if it needs every object in every frame and one is lost.
    """

    residual: float
    """Pixels; infinite if an object is lost."""
    speed: float
    roughness: float
    variation: float
    whole: float
    """1 if every frame has exactly the expected objects, each in one piece; else 0."""
    colours: float
    shapes: float
    directions: float
    """Each of the three is 1 if it agrees with the caption, else 0."""
    features: Float[np.ndarray, "n d"]
    changes: Int[np.ndarray, "256"]


def measure_clip(clip: Pixels, caption: str | None, fps: float | int) -> ClipMetrics:
    """Measure one clip.

    Without a caption of this world, the visible objects count as the expected ones, and the law as bouncing.
    """
    spec = ClipSpec(len(clip), clip.shape[1:3], fps)
    law, objects = (read_caption(caption) if caption else None) or ("bouncing", ())
    found = track(clip)
    tracks = _match(found, objects) if objects else found
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


def _match(found: Sequence[Track], objects: Sequence[SceneObject]) -> list[Track]:
    """Assign to each object the track of its colour, else the largest unassigned track, as long as there are any."""
    by_colour = {t.colour: t for t in found}
    wanted = {obj.colour for obj in objects}
    others = iter([t for t in found if t.colour not in wanted])
    matched = [by_colour.get(obj.colour) or next(others, None) for obj in objects]
    return [t for t in matched if t is not None]


def moves_in_direction(centres: Float[np.ndarray, "t 2"], law: str, direction: str) -> bool:
    """Whether an object starts in the direction of its caption; an object without a direction must stand still.

    Uniform motion, the horizontal motion under gravity and orbits are judged over the whole clip. Motion that ends at a
    wall or at another object is judged over the first quarter, before the contact.
    """
    steps = np.diff(centres, axis=0)
    if not direction:
        return bool(np.linalg.norm(steps, axis=-1).mean() < thresholds.MOVING)
    if direction in ROTATIONS:
        before, after = steps[:-1], steps[1:]
        turn = (before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]).sum()
        return bool(np.linalg.norm(steps, axis=-1).mean() > thresholds.MOVING and turn * ROTATIONS[direction] > 0)
    if law in ("bouncing", "collision"):
        steps = steps[: max(1, len(steps) // 4)]
    mean, wanted = steps.mean(0), np.array(DIRECTIONS[direction])
    if law == "gravity":
        mean = mean * [1, 0]
    length = np.linalg.norm(mean)
    cosine = mean @ wanted / max(length, 1e-9) / np.linalg.norm(wanted)
    return bool(length > thresholds.MOVING and cosine > np.cos(np.radians(thresholds.SECTOR)))
