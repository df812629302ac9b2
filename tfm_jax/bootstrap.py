"""Computes confidence intervals with the percentile bootstrap."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tfm_jax.numbers import format_number

CONFIDENCE = 0.95
"""Confidence level of every interval."""
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
"""The quantiles at which an interval starts and ends."""
RESAMPLES = 10_000
BATCH = 100
"""Number of resamples that are in memory at a time; a divisor of RESAMPLES."""


class Interval(NamedTuple):
    """A confidence interval; an end is infinite if the data do not bound it."""

    low: float
    high: float


def bootstrap_interval(values: Float[np.ndarray, "n *row"], statistic: Callable[..., np.ndarray]) -> Interval:
    """Return the interval of a statistic over the rows of `values`.

    The rows are resampled with a fixed random seed. `statistic` takes an array of rows and the `axis` of the rows, and
    returns one number. Where it is undefined (NaN), it counts as -inf for the lower end and as inf for the upper end.
    """
    rng, size = np.random.default_rng(0), (BATCH, len(values))
    batches = [statistic(values[rng.integers(len(values), size=size)], axis=1) for _ in range(RESAMPLES // BATCH)]
    found = np.concatenate(batches)
    undefined = np.isnan(found)
    # Both ends are values of the statistic: interpolating between two of them fails if one is infinite.
    low = np.quantile(np.where(undefined, -np.inf, found), TAILS[0], method="lower")
    high = np.quantile(np.where(undefined, np.inf, found), TAILS[1], method="higher")
    return Interval(float(low), float(high))


def format_estimate(value: float, interval: Interval, digits: int = 2) -> str:
    """Format a value and its interval, such as "-2.1 [-2.9, -1.4]"."""
    number, low, high = (format_number(each, digits) for each in (value, *interval))
    return f"{number} [{low}, {high}]"
