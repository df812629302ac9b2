"""The physics residual: the distance of the objects' centres from the closest paths that their law allows."""

from collections.abc import Callable
from itertools import product

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from tfm_jax.moving_shapes import laws
from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.scene import ORBIT_RADII, ClipSpec

NUM_REFINED = 4
"""Number of starting points, the best of those tried, from which a fit is refined."""

Numbers = Float[np.ndarray, "..."]


def residual(law: str, centres: Float[np.ndarray, "n t 2"], spec: ClipSpec) -> float:
    """Return R = min over paths p allowed by the law: sqrt(mean_{t, objects} |centre_t - p_t|^2), in pixels.

    Walls, gravity and sizes are those of the world. The residual is infinite if there are no objects, if an object is
    not visible in some frame, or if a collision does not have two objects.
    """
    if not np.isfinite(centres).all() or not len(centres) or (law == "collision" and len(centres) != 2):
        return np.inf
    inside = centres - spec.radius
    if law == "collision":
        return float(np.sqrt(_collision(inside, spec) / (2 * spec.frames)))
    squares = [FITS[law](path, spec) for path in inside]
    return float(np.sqrt(sum(squares) / (len(squares) * spec.frames)))


def _minimise(path: Callable[[Numbers], Numbers], starts: Float[np.ndarray, "n k"], target: Numbers) -> float:
    """Return the minimum of the sum of squares of path(parameters) - target, refining the best of the starts.

    `path` maps parameters `[..., k]` to positions `[..., t]`.
    """
    costs = ((path(starts) - target) ** 2).sum(-1)
    best = starts[np.argsort(costs)[:NUM_REFINED]]
    return min(2 * float(least_squares(lambda q: path(q) - target, start, method="lm").cost) for start in best)


def _polynomial(target: Float[np.ndarray, "t axes"], degree: int, spec: ClipSpec) -> float:
    basis = np.vander(spec.times, degree + 1)
    return float(((basis @ np.linalg.lstsq(basis, target)[0] - target) ** 2).sum())


def _still(target: Float[np.ndarray, "t 2"], spec: ClipSpec) -> float:
    return _polynomial(target, 0, spec)


def _uniform(target: Float[np.ndarray, "t 2"], spec: ClipSpec) -> float:
    return _polynomial(target, 1, spec)


def _bouncing(target: Float[np.ndarray, "t 2"], spec: ClipSpec) -> float:
    """Fit each axis separately, with two parameters: start position and velocity."""
    fastest = thresholds.FASTEST * spec.unit / spec.fps

    def fit_axis(axis: int) -> float:
        extent = spec.extent[axis]
        starts = np.array(list(product(np.linspace(0, extent, 17), np.linspace(-fastest, fastest, 33))))
        return _minimise(
            lambda q: laws.reflect(laws.uniform(q[..., :1], q[..., 1:], spec.times), extent), starts, target[:, axis]
        )

    return fit_axis(0) + fit_axis(1)


def _gravity(target: Float[np.ndarray, "t 2"], spec: ClipSpec) -> float:
    """Fit uniform motion along x; along y, fit the height and the time of an apex."""
    floor = spec.extent[1]
    longest = np.sqrt(8 * floor / spec.gravity)
    starts = np.array(list(product(np.linspace(0.1, 1, 19) * floor, np.linspace(-0.5, 0.5, 17) * longest)))

    def fall(q: Numbers) -> Numbers:
        return floor - laws.bounce_height(abs(q[..., :1]) + 1e-3, q[..., 1:], spec.times, spec.gravity)

    return _polynomial(target[:, :1], 1, spec) + _minimise(fall, starts, target[:, 1])


def _orbit(target: Float[np.ndarray, "t 2"], spec: ClipSpec) -> float:
    """Search for the angular speed; for a given one, linear least squares yield the centre and the arm."""
    fastest = thresholds.FASTEST * spec.unit / spec.fps / (ORBIT_RADII[0] * spec.unit)
    flat = target.ravel()

    def basis(angular_speed: float) -> Float[np.ndarray, "t2 4"]:
        units = np.eye(2)
        arms = [laws.orbit(np.zeros(2), unit, angular_speed, spec.times).ravel() for unit in units]
        return np.stack([*np.tile(units, (spec.frames, 1)).T, *arms], -1)

    def gap(angular_speed: float) -> Float[np.ndarray, "t2"]:
        columns = basis(angular_speed)
        return columns @ np.linalg.lstsq(columns, flat)[0] - flat

    speeds = np.linspace(-fastest, fastest, 65)
    best = speeds[np.argsort([(gap(speed) ** 2).sum() for speed in speeds])[:NUM_REFINED]]
    return min(2 * float(least_squares(lambda q: gap(q[0]), start).cost) for start in best)


def _returning(target: Float[np.ndarray, "t 2"], spec: ClipSpec) -> float:
    """Fit start and velocity freely, and the direction of an acceleration whose size is given.

    The part of t^2 / 2 that is orthogonal to uniform motion adds a vector to the path. Of the vectors of the given
    length, the closest to the vector of the target has its direction.
    """
    bend = spec.times**2 / 2
    line = np.vander(spec.times, 2)
    bend -= line @ np.linalg.lstsq(line, bend)[0]
    size = np.linalg.norm(bend)
    found = np.linalg.norm(bend @ target) / size
    return _polynomial(target, 2, spec) + float((found - spec.deceleration * size) ** 2)


def _collision(target: Float[np.ndarray, "2 t 2"], spec: ClipSpec) -> float:
    """Fit both objects together, starting from the best continuous two-segment paths over all contact times."""
    flat = np.moveaxis(target, 1, 0).reshape(spec.frames, 4)
    fits = []
    for contact in np.arange(1, spec.frames - 1):
        basis = np.stack([np.ones(spec.frames), spec.times, np.maximum(spec.times - contact, 0)], -1)
        fit = np.linalg.lstsq(basis, flat)[0]
        fits.append((((basis @ fit - flat) ** 2).sum(), fit[:2].ravel()))

    def gap(q: Float[np.ndarray, "8"]) -> Numbers:
        starts, velocities = q.reshape(2, 2, 2)
        return (laws.collide(starts, velocities, spec.times, 2 * spec.radius) - target).ravel()

    best = sorted(fits, key=lambda fit: fit[0])[:NUM_REFINED]
    return min(2 * float(least_squares(gap, start, x_scale="jac").cost) for _, start in best)


FITS: dict[str, Callable[[Float[np.ndarray, "t 2"], ClipSpec], float]] = {
    "still": _still, "uniform": _uniform, "bouncing": _bouncing, "gravity": _gravity, "orbit": _orbit,
    "returning": _returning,
}  # fmt: skip
"""Law, except collision -> function that returns the smallest sum of squares for one object."""
