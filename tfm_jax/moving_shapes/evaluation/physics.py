"""The physics residual: how far the centres of a clip's objects are from the closest path that their law allows."""

from collections.abc import Callable
from itertools import product

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from tfm_jax.moving_shapes import laws
from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.world import ORBITS, Stage

KEPT = 4
"""Starts, the best ones of a grid, that are refined."""

Along = Float[np.ndarray, "t"]
Numbers = Float[np.ndarray, "..."]


def residual(law: str, centres: Float[np.ndarray, "n t 2"], stage: Stage) -> float:
    """R = min over the paths of the law of sqrt(mean_t |centre_t - path_t|^2), in pixels, over all objects of a clip.

    The walls, gravity and the size of the bodies are the world's. Infinite where an object is not seen in some frame,
    or is alone in a collision.
    """
    if not np.isfinite(centres).all() or not len(centres) or (law == "collision" and len(centres) != 2):
        return np.inf
    inside = centres - stage.radius
    if law == "collision":
        return float(np.sqrt(_collision(inside, stage) / (2 * stage.frames)))
    squares = [FITS[law](path, stage) for path in inside]
    return float(np.sqrt(sum(squares) / (len(squares) * stage.frames)))


def _least(path: Callable[[Numbers], Numbers], starts: Float[np.ndarray, "n k"], target: Numbers) -> float:
    """Least sum of squares of path(parameters) - target, refined from the best of the starts.

    `path` takes parameters `[..., k]` and gives `[..., t]`.
    """
    costs = ((path(starts) - target) ** 2).sum(-1)
    best = starts[np.argsort(costs)[:KEPT]]
    return min(2 * float(least_squares(lambda q: path(q) - target, start, method="lm").cost) for start in best)


def _polynomial(target: Float[np.ndarray, "t axes"], degree: int, stage: Stage) -> float:
    basis = np.vander(stage.times, degree + 1)
    return float(((basis @ np.linalg.lstsq(basis, target)[0] - target) ** 2).sum())


def _still(target: Float[np.ndarray, "t 2"], stage: Stage) -> float:
    return _polynomial(target, 0, stage)


def _uniform(target: Float[np.ndarray, "t 2"], stage: Stage) -> float:
    return _polynomial(target, 1, stage)


def _bouncing(target: Float[np.ndarray, "t 2"], stage: Stage) -> float:
    """The axes are independent: two parameters each, p0 and v."""
    fastest = thresholds.FASTEST * stage.width / stage.fps

    def along(axis: int) -> float:
        room = stage.room[axis]
        starts = np.array(list(product(np.linspace(0, room, 17), np.linspace(-fastest, fastest, 33))))
        return _least(
            lambda q: laws.fold(laws.line(q[..., :1], q[..., 1:], stage.times), room), starts, target[:, axis]
        )

    return along(0) + along(1)


def _gravity(target: Float[np.ndarray, "t 2"], stage: Stage) -> float:
    """Along x uniform; along y the height and the time of an apex."""
    floor = stage.room[1]
    longest = np.sqrt(8 * floor / stage.gravity)
    starts = np.array(list(product(np.linspace(0.1, 1, 19) * floor, np.linspace(-0.5, 0.5, 17) * longest)))

    def fall(q: Numbers) -> Numbers:
        return floor - laws.hop(abs(q[..., :1]) + 1e-3, q[..., 1:], stage.times, stage.gravity)

    return _polynomial(target[:, :1], 1, stage) + _least(fall, starts, target[:, 1])


def _orbit(target: Float[np.ndarray, "t 2"], stage: Stage) -> float:
    """The angular speed is searched; centre and arm follow from it by linear least squares."""
    fastest = thresholds.FASTEST * stage.width / stage.fps / (ORBITS[0] * stage.width)
    flat = target.ravel()

    def basis(turn: float) -> Float[np.ndarray, "t2 4"]:
        units = np.eye(2)
        arms = [laws.circle(np.zeros(2), unit, turn, stage.times).ravel() for unit in units]
        return np.stack([*np.tile(units, (stage.frames, 1)).T, *arms], -1)

    def gap(turn: float) -> Float[np.ndarray, "t2"]:
        columns = basis(turn)
        return columns @ np.linalg.lstsq(columns, flat)[0] - flat

    turns = np.linspace(-fastest, fastest, 65)
    best = turns[np.argsort([(gap(turn) ** 2).sum() for turn in turns])[:KEPT]]
    return min(2 * float(least_squares(lambda q: gap(q[0]), start).cost) for start in best)


def _collision(target: Float[np.ndarray, "2 t 2"], stage: Stage) -> float:
    """Both bodies at once, from the continuous path of two straight pieces that fits best, for every contact time."""
    flat = np.moveaxis(target, 1, 0).reshape(stage.frames, 4)
    fits = []
    for contact in np.arange(1, stage.frames - 1):
        basis = np.stack([np.ones(stage.frames), stage.times, np.maximum(stage.times - contact, 0)], -1)
        fit = np.linalg.lstsq(basis, flat)[0]
        fits.append((((basis @ fit - flat) ** 2).sum(), fit[:2].ravel()))

    def gap(q: Float[np.ndarray, "8"]) -> Numbers:
        starts, velocities = q.reshape(2, 2, 2)
        return (laws.collide(starts, velocities, stage.times, 2 * stage.radius) - target).ravel()

    best = sorted(fits, key=lambda fit: fit[0])[:KEPT]
    return min(2 * float(least_squares(gap, start, x_scale="jac").cost) for _, start in best)


FITS: dict[str, Callable[[Float[np.ndarray, "t 2"], Stage], float]] = {
    "still": _still, "uniform": _uniform, "bouncing": _bouncing, "gravity": _gravity, "orbit": _orbit,
}  # fmt: skip
"""Law -> the least sum of squares for one object."""
