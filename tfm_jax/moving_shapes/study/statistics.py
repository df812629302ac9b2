"""Paired differences and bootstrap intervals over a few seeds."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tfm_jax.moving_shapes.study import protocol

Numbers = Float[np.ndarray, "n"]


class Estimate(NamedTuple):
    """A mean with its interval; `values` are what it is the mean of, one for each seed."""

    value: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def seen(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def bootstrap(values: Sequence[float] | Numbers, middle: Callable[..., np.ndarray] = np.mean) -> Estimate:
    """Percentile bootstrap of the mean (or another `middle`, called with `axis`), with resamples of a fixed seed."""
    array = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).integers(len(array), size=(protocol.RESAMPLES, len(array)))
    tail = (1 - protocol.LEVEL) / 2
    low, high = np.quantile(middle(array[draws], axis=1), (tail, 1 - tail))
    return Estimate(float(middle(array, axis=0)), float(low), float(high), tuple(array.tolist()))


def paired(one: dict[int, float | None], other: dict[int, float | None]) -> Estimate | None:
    """The difference one - other over the seeds that both have.

    None where a seed has no number in one of them: leaving it out would favour the arm that failed on it.
    """
    seeds = sorted(one.keys() & other.keys())
    differences = [_minus(one[seed], other[seed]) for seed in seeds]
    if not differences or not all(map(math.isfinite, differences)):
        return None
    return bootstrap(differences)


def coverage(count: int, trials: int = 2000) -> float:
    """How often the interval over `count` normal numbers holds their true mean: less than LEVEL, when they are few."""
    rng = np.random.default_rng(1)
    draws = rng.integers(count, size=(1000, count))  # the same resamples in every trial, which are independent anyway
    means = rng.normal(size=(trials, count))[:, draws].mean(-1)
    tail = (1 - protocol.LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=1)
    return float(((low <= 0) & (high >= 0)).mean())


def _minus(a: float | None, b: float | None) -> float:
    return math.nan if a is None or b is None else a - b
