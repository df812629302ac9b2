"""Draws random paths that obey a law of motion and stay inside the picture."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tfm_jax.errors import InputError
from tfm_jax.moving_shapes import laws
from tfm_jax.moving_shapes.scene import (
    CLEARANCE,
    CONTACT_TIMES,
    DIRECTIONS,
    DROP_HEIGHTS,
    HORIZONTAL,
    MIN_IMPACT_SPEED,
    ORBIT_RADII,
    ROTATIONS,
    ClipSpec,
)  # fmt: skip

MAX_ATTEMPTS = 10_000

SpeedRanges = dict[str, tuple[float, float]]


class Motion(NamedTuple):
    """How an object moves."""

    direction: str
    pace: str
    speed: float
    """Units per second."""


def draw_motions(
    rng: np.random.Generator, law: str, count: int, spec: ClipSpec, speeds: SpeedRanges
) -> tuple[list[Motion], Float[np.ndarray, "n t 2"]]:
    """Draw motions and paths until all objects stay inside the walls and, unless they collide, clear of each other.

    Returns:
        The motions, and the paths in pixels, measured from the upper left corner of the area that centres can reach.

    Raises:
        InputError: the clip is so long that the motion does not fit into the picture.
    """
    for _ in range(MAX_ATTEMPTS):
        motions = [_draw_motion(rng, law, speeds) for _ in range(count)]
        if law == "collision":
            paths = _collision(rng, spec, motions)
            if (paths >= 0).all() and (paths <= spec.extent).all():
                return motions, paths
        else:
            paths = np.stack([_PATHS[law](rng, spec, motion) for motion in motions])
            pairs = combinations(paths, 2)
            if all(np.linalg.norm(a - b, axis=-1).min() > CLEARANCE * spec.radius for a, b in pairs):
                return motions, paths
    raise _too_long(spec, f"{law} of {count} objects")


def _too_long(spec: ClipSpec, motion: str) -> InputError:
    clip = f"{spec.frames} frames of {spec.size[0]} x {spec.size[1]} pixels at {spec.fps} fps"
    return InputError(f"{clip}: {motion} does not fit into the picture; expected a shorter clip, of about a second")


def _draw_motion(rng: np.random.Generator, law: str, speeds: SpeedRanges) -> Motion:
    if law == "still":
        return Motion("", "", 0.0)
    names = {"gravity": HORIZONTAL, "orbit": tuple(ROTATIONS)}.get(law, tuple(DIRECTIONS))
    pace = str(rng.choice(list(speeds)))
    return Motion(str(rng.choice(names)), pace, float(rng.uniform(*speeds[pace])))


def _velocity(spec: ClipSpec, motion: Motion) -> Float[np.ndarray, "2"]:
    """Return the velocity in pixels per frame."""
    direction = np.array(DIRECTIONS[motion.direction])
    return direction / np.linalg.norm(direction) * motion.speed * spec.unit / spec.fps


def _draw_start(
    rng: np.random.Generator, spec: ClipSpec, displacement: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "2"]:
    """Draw a start from which `displacement` (x, y), in pixels, stays inside the walls."""
    free = spec.extent - abs(displacement)
    if (free < 0).any():
        raise _too_long(spec, f"a path of {abs(displacement).max():.0f} pixels")
    start = rng.uniform(size=2) * free
    return np.where(displacement < 0, spec.extent - start, start)


def _still(rng: np.random.Generator, spec: ClipSpec, motion: Motion) -> Float[np.ndarray, "t 2"]:
    return np.tile(_draw_start(rng, spec, np.zeros(2)), (spec.frames, 1))


def _uniform(rng: np.random.Generator, spec: ClipSpec, motion: Motion) -> Float[np.ndarray, "t 2"]:
    velocity = _velocity(spec, motion)
    start = _draw_start(rng, spec, velocity * spec.times[-1])
    return laws.uniform(start, velocity, spec.times[:, None])


def _bouncing(rng: np.random.Generator, spec: ClipSpec, motion: Motion) -> Float[np.ndarray, "t 2"]:
    """Draw a start from which the object first reaches a wall at a time within CONTACT_TIMES."""
    velocity = _velocity(spec, motion)
    moving = np.flatnonzero(velocity)
    contact = rng.uniform(*CONTACT_TIMES) * min(spec.times[-1], (spec.extent / abs(velocity).clip(1e-9)).min())
    start = _draw_start(rng, spec, velocity * contact)
    axis = rng.choice(moving)
    start[axis] = (spec.extent[axis] if velocity[axis] > 0 else 0) - velocity[axis] * contact
    return laws.reflect(laws.uniform(start, velocity, spec.times[:, None]), spec.extent)


def _gravity(rng: np.random.Generator, spec: ClipSpec, motion: Motion) -> Float[np.ndarray, "t 2"]:
    velocity = _velocity(spec, motion)
    x = laws.uniform(_draw_start(rng, spec, velocity * spec.times[-1])[0], velocity[0], spec.times)
    floor = spec.extent[1]
    height = laws.bounce_height(rng.uniform(*DROP_HEIGHTS) * floor, 0.0, spec.times, spec.gravity)
    return np.stack([x, floor - height], -1)


def _orbit(rng: np.random.Generator, spec: ClipSpec, motion: Motion) -> Float[np.ndarray, "t 2"]:
    radius = rng.uniform(*ORBIT_RADII) * spec.unit
    centre = radius + rng.uniform(size=2) * (spec.extent - 2 * radius)
    angle = rng.uniform(0, 2 * np.pi)
    angular_speed = ROTATIONS[motion.direction] * motion.speed * spec.unit / spec.fps / radius
    return laws.orbit(centre, radius * np.array([np.cos(angle), np.sin(angle)]), angular_speed, spec.times)


def _returning(rng: np.random.Generator, spec: ClipSpec, motion: Motion) -> Float[np.ndarray, "t 2"]:
    velocity = _velocity(spec, motion)
    acceleration = -velocity / np.linalg.norm(velocity) * spec.deceleration
    path = laws.accelerated(0.0, velocity, acceleration, spec.times[:, None])
    free = spec.extent - np.ptp(path, axis=0)
    if (free < 0).any():
        raise _too_long(spec, f"a path of {np.ptp(path, axis=0).max():.0f} pixels")
    return path - path.min(0) + rng.uniform(size=2) * free


_PATHS: dict[str, Callable[[np.random.Generator, ClipSpec, Motion], Float[np.ndarray, "t 2"]]] = {
    "still": _still, "uniform": _uniform, "bouncing": _bouncing, "gravity": _gravity, "orbit": _orbit,
    "returning": _returning,
}  # fmt: skip


def _collision(rng: np.random.Generator, spec: ClipSpec, motions: Sequence[Motion]) -> Float[np.ndarray, "2 t 2"]:
    """Draw the contact and trace the paths back to the start; return infinite positions if the impact is too weak."""
    velocities = np.stack([_velocity(spec, motion) for motion in motions])
    angle = rng.uniform(0, 2 * np.pi)
    normal = np.array([np.cos(angle), np.sin(angle)])
    middle = rng.uniform(size=2) * spec.extent
    contact = rng.uniform(*CONTACT_TIMES) * spec.times[-1]
    if (velocities[0] - velocities[1]) @ normal < MIN_IMPACT_SPEED * spec.unit / spec.fps:
        return np.full((2, spec.frames, 2), np.inf)
    starts = middle + np.stack([-normal, normal]) * spec.radius - velocities * contact
    return laws.collide(starts, velocities, spec.times, 2 * spec.radius)
