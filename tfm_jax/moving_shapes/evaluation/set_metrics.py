"""Metrics of a set of clips, distances between two sets, and the comparison of generated clips with real ones."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.evaluation.clip_metrics import ClipMetrics
from tfm_jax.moving_shapes.evaluation.metrics import frechet, wasserstein

ClipSet = Sequence[ClipMetrics]


def _finite_mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else np.nan


def _frechet_of_motion(a: ClipSet, b: ClipSet) -> float:
    return frechet(np.concatenate([clip.features for clip in a]), np.concatenate([clip.features for clip in b]))


def _wasserstein_of_changes(a: ClipSet, b: ClipSet) -> float:
    return wasserstein(*(np.sum([clip.changes for clip in clips], 0) for clips in (a, b)))


SET_METRICS: dict[str, tuple[str, Callable[[ClipSet], float]]] = {
    "tracked": (
        "clips with every object in every frame",
        lambda clips: _finite_mean([float(np.isfinite(c.speed)) for c in clips]),
    ),
    "residual": ("physics residual R, median, pixels", lambda clips: float(np.median([c.residual for c in clips]))),
    "faithful": (
        f"clips with R < {thresholds.FAITHFUL}",
        lambda clips: _finite_mean([float(c.residual < thresholds.FAITHFUL) for c in clips]),
    ),
    "speed": ("speed S, pixels per frame", lambda clips: _finite_mean([c.speed for c in clips])),
    "moving": (
        f"clips with S > {thresholds.MOVING}",
        lambda clips: _finite_mean([float(c.speed > thresholds.MOVING) for c in clips]),
    ),
    "roughness": ("roughness J: acceleration over speed", lambda clips: _finite_mean([c.roughness for c in clips])),
    "variation": ("change of an object's size over a clip", lambda clips: _finite_mean([c.variation for c in clips])),
    "whole": ("clips with the right number of whole objects", lambda clips: _finite_mean([c.whole for c in clips])),
    "colours": ("clips with the right colours", lambda clips: _finite_mean([c.colours for c in clips])),
    "shapes": ("clips with the right shapes", lambda clips: _finite_mean([c.shapes for c in clips])),
    "directions": ("clips with the right directions", lambda clips: _finite_mean([c.directions for c in clips])),
}
"""Metric -> its title and the function that computes it from one set of clips."""

SET_DISTANCES: dict[str, tuple[str, Callable[[ClipSet, ClipSet], float]]] = {
    "smoothness_gap": (
        "difference in roughness",
        lambda a, b: abs(_finite_mean([clip.roughness for clip in a]) - _finite_mean([clip.roughness for clip in b])),
    ),
    "frechet": ("Frechet motion distance, pixels^2", _frechet_of_motion),
    "wasserstein": ("Wasserstein distance of frame differences", _wasserstein_of_changes),
}
"""Metric -> its title and the function that computes it from two sets of clips."""

TITLES = {name: title for name, (title, _) in (*SET_METRICS.items(), *SET_DISTANCES.items())}
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
        for name, (_, metric) in SET_METRICS.items():
            rows[name].append((np.nan, abs(_difference(metric(one), metric(other)))))
        for name, (_, distance) in SET_DISTANCES.items():
            rows[name].append((distance(some, other), distance(one, other)))
    means = {name: [_finite_mean(column) for column in zip(*values, strict=True)] for name, values in rows.items()}
    table = [Row(name, of(generated), of(reference), means[name][1]) for name, (_, of) in SET_METRICS.items()]
    table += [Row(name, means[name][0], np.nan, means[name][1]) for name in SET_DISTANCES]
    return table, size


def _difference(a: float, b: float) -> float:
    return a - b if np.isfinite(a) and np.isfinite(b) else np.nan
