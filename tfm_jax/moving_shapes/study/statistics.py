"""Computes paired differences and bootstrap intervals over a few seeds."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tfm_jax.moving_shapes.bootstrap import TAILS, bootstrap_interval

Numbers = Float[np.ndarray, "n"]


class Estimate(NamedTuple):
    """A mean or median with its interval, and the values from which it was computed, such as one per seed."""

    value: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def bootstrap(values: Sequence[float] | Numbers, statistic: Callable[..., np.ndarray] = np.mean) -> Estimate:
    """Estimate the mean, or another statistic that takes `axis`, with its bootstrap interval."""
    array = np.asarray(values, np.float64)
    return Estimate(float(statistic(array, axis=0)), *bootstrap_interval(array, statistic), tuple(array.tolist()))


def paired_difference(one: dict[int, float | None], other: dict[int, float | None]) -> Estimate | None:
    """Estimate one - other over the seeds that both have.

    Return None if there are no such seeds, or if the value of one of them is missing or not finite: leaving that
    seed out would favour the arm that failed.
    """
    seeds = sorted(one.keys() & other.keys())
    differences = [_minus(one[seed], other[seed]) for seed in seeds]
    if not differences or not all(map(math.isfinite, differences)):
        return None
    return bootstrap(differences)


def interval_coverage(count: int, trials: int = 2000) -> float:
    """Return the fraction of bootstrap intervals over `count` normally distributed numbers that contain the true mean.

    If `count` is small, the fraction is below CONFIDENCE.
    """
    rng = np.random.default_rng(1)
    draws = rng.integers(count, size=(1000, count))  # the trials share the resamples, but their numbers are independent
    weights = np.stack([np.bincount(draw, minlength=count) for draw in draws]) / count
    means = rng.normal(size=(trials, count)) @ weights.T
    low, high = np.quantile(means, TAILS, axis=1)
    return float(((low <= 0) & (high >= 0)).mean())


def _minus(a: float | None, b: float | None) -> float:
    return math.nan if a is None or b is None else a - b
