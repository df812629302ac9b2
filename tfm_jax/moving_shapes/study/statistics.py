"""Paired differences over the seeds with their t intervals, and the smallest difference that a study can detect."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from tfm_jax.moving_shapes.study import protocol


class Estimate(NamedTuple):
    """A mean with its confidence interval, and the values from which it was computed, one per seed."""

    value: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def t_interval(values: Sequence[float], level: float) -> Estimate:
    """Estimate the mean of two or more normally distributed values, with its t interval at this confidence level."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    margin = _critical(len(values), level) * spread / math.sqrt(len(values))
    return Estimate(mean, mean - margin, mean + margin, tuple(map(float, values)))


def paired_difference(
    one: Mapping[int, float | None], other: Mapping[int, float | None], level: float
) -> Estimate | None:
    """Estimate one - other over the seeds that both have.

    Return None if there are fewer than two such seeds, or if the value of one of them is missing or not finite: leaving
    that seed out would favour the arm that failed.
    """
    seeds = sorted(one.keys() & other.keys())
    differences = [_minus(one[seed], other[seed]) for seed in seeds]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    return t_interval(differences, level)


def corrected_level(comparisons: int) -> float:
    """Return the confidence level of each interval in a family of comparisons, by Bonferroni's correction."""
    return 1 - protocol.ERROR_RATE / comparisons


def pooled_spread(groups: Sequence[Sequence[float]]) -> float:
    """Return the standard deviation within groups that may have different means."""
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


def smallest_detectable(spread: float, seeds: int, level: float) -> float:
    """Return the true difference whose t interval excludes 0 with the probability POWER.

    Args:
        spread: standard deviation of the paired differences.
        level: confidence level of the interval.
    """
    critical = _critical(seeds, level)

    def power(difference: float) -> float:
        """Return the probability that the interval excludes 0; `difference` is in standard errors."""
        # The t statistic is (difference + z) / sqrt(v / (n - 1)), where v is chi-squared. Average over v: scipy's
        # noncentral t distribution fails for large critical values.
        quantiles = stats.chi2.ppf((np.arange(10_000) + 0.5) / 10_000, seeds - 1)
        bound = critical * np.sqrt(quantiles / (seeds - 1))
        return float(np.mean(stats.norm.sf(bound - difference) + stats.norm.cdf(-bound - difference)))

    found: Any = optimize.brentq(lambda difference: power(difference) - protocol.POWER, 0, 10 * critical + 10)
    return spread * float(found) / math.sqrt(seeds)


def _critical(count: int, level: float) -> float:
    """Return the quantile of the t distribution that bounds an interval over `count` values."""
    return float(stats.t.ppf((1 + level) / 2, count - 1))


def _minus(a: float | None, b: float | None) -> float:
    return math.nan if a is None or b is None else a - b
