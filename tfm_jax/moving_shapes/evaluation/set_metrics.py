"""Metrics of a set of clips, distances between two sets, and the comparison of generated clips with real ones."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.evaluation.clip_metrics import ClipMetrics
from tfm_jax.moving_shapes.evaluation.metrics import frechet, wasserstein

ClipSet = Sequence[ClipMetrics]


class SetMetric(NamedTuple):
    """A metric of a set of clips: an average over one value per clip."""

    title: str
    of_clip: Callable[[ClipMetrics], float | bool]
    average: Callable[..., np.ndarray]
    """Takes an array and the `axis` to average over."""

    def values(self, clips: ClipSet) -> Float[np.ndarray, "n"]:
        """Return the value of every clip; it can be NaN or infinite."""
        return np.array([self.of_clip(clip) for clip in clips], np.float64)

    def __call__(self, clips: ClipSet) -> float:
        return float(self.average(self.values(clips), axis=0))


def finite_mean(values: Float[np.ndarray, "..."], axis: int = 0) -> Float[np.ndarray, "..."]:
    """Return the mean of the finite values along an axis; NaN where there are none."""
    finite = np.isfinite(values)
    total, count = np.where(finite, values, 0).sum(axis), finite.sum(axis)
    return np.where(count > 0, total / count.clip(1), np.nan)


def _frechet_of_motion(a: ClipSet, b: ClipSet) -> float:
    return frechet(np.concatenate([clip.features for clip in a]), np.concatenate([clip.features for clip in b]))


def _wasserstein_of_changes(a: ClipSet, b: ClipSet) -> float:
    return wasserstein(*(np.sum([clip.changes for clip in clips], 0) for clips in (a, b)))


SET_METRICS = {
    "tracked": SetMetric("clips with every object in every frame", lambda c: np.isfinite(c.speed), finite_mean),
    "residual": SetMetric("physics residual R, median, pixels", lambda c: c.residual, np.median),
    "faithful": SetMetric(
        f"clips with R < {thresholds.FAITHFUL}", lambda c: c.residual < thresholds.FAITHFUL, finite_mean
    ),
    "speed": SetMetric("speed S, pixels per frame", lambda c: c.speed, finite_mean),
    "moving": SetMetric(f"clips with S > {thresholds.MOVING}", lambda c: c.speed > thresholds.MOVING, finite_mean),
    "roughness": SetMetric("roughness J: acceleration over speed", lambda c: c.roughness, finite_mean),
    "variation": SetMetric("change of an object's size over a clip", lambda c: c.variation, finite_mean),
    "whole": SetMetric("clips with the right number of whole objects", lambda c: c.whole, finite_mean),
    "colours": SetMetric("clips with the right colours", lambda c: c.colours, finite_mean),
    "shapes": SetMetric("clips with the right shapes", lambda c: c.shapes, finite_mean),
    "directions": SetMetric("clips with the right directions", lambda c: c.directions, finite_mean),
}
"""The metrics that can be computed from one set of clips."""

SET_DISTANCES: dict[str, tuple[str, Callable[[ClipSet, ClipSet], float]]] = {
    "smoothness_gap": (
        "difference in roughness",
        lambda a, b: abs(SET_METRICS["roughness"](a) - SET_METRICS["roughness"](b)),
    ),
    "frechet": ("Frechet motion distance, pixels^2", _frechet_of_motion),
    "wasserstein": ("Wasserstein distance of frame differences", _wasserstein_of_changes),
}
"""Metric -> its title and the function that computes it from two sets of clips."""

TITLES = {name: metric.title for name, metric in SET_METRICS.items()}
TITLES |= {name: title for name, (title, _) in SET_DISTANCES.items()}
"""Metric -> its title in all tables."""


class Row(NamedTuple):
    """One row of the comparison; missing numbers are NaN."""

    metric: str
    generated: float
    """Metric of the generated clips, or their distance from the reference."""
    reference: float
    """Metric of the reference; NaN if the row is a distance."""
    floor: float


def compare(generated: ClipSet, reference: ClipSet) -> tuple[list[Row], int]:
    """Return the rows of the comparison, and the number n of clips on each side of a distance.

    Distances depend on the number of clips, so both sides always have n clips: n is the number of generated clips, or
    half the number of reference clips if that is smaller. In each of SPLITS random draws, n generated clips are
    compared with n reference clips and, for the floor, n other reference clips are compared with the same ones; the
    results are averaged.
    For a metric of one set, the floor is the mean difference between the two sets of reference clips.
    """
    rng = np.random.default_rng(0)
    size = min(len(generated), len(reference) // 2)
    rows = {name: [] for name in TITLES}
    for _ in range(thresholds.SPLITS):
        order = rng.permutation(len(reference))
        one, other = ([reference[i] for i in part] for part in (order[:size], order[size : 2 * size]))
        some = [generated[i] for i in rng.permutation(len(generated))[:size]]
        for name, metric in SET_METRICS.items():
            rows[name].append((np.nan, abs(_difference(metric(one), metric(other)))))
        for name, (_, distance) in SET_DISTANCES.items():
            rows[name].append((distance(some, other), distance(one, other)))
    means = {name: finite_mean(np.array(values)).tolist() for name, values in rows.items()}
    table = [Row(name, of(generated), of(reference), means[name][1]) for name, of in SET_METRICS.items()]
    table += [Row(name, means[name][0], np.nan, means[name][1]) for name in SET_DISTANCES]
    return table, size


def _difference(a: float, b: float) -> float:
    return a - b if np.isfinite(a) and np.isfinite(b) else np.nan
