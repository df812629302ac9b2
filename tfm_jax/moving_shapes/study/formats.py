"""Formats numbers, intervals, metric titles and lists for the report of a study."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tfm_jax.moving_shapes.evaluation.set_metrics import TITLES
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.statistics import Estimate
from tfm_jax.numbers import format_number


def format_spread(by_seed: Mapping[int, float | None]) -> str:
    """Format the mean ± standard deviation over the seeds, and how many seeds have no number.

    A single number has no standard deviation.
    """
    numbers = [value for value in by_seed.values() if value is not None]
    if not numbers:
        return format_number(None)
    missing = len(by_seed) - len(numbers)
    spread = f" ± {np.std(numbers, ddof=1):.2g}" if len(numbers) > 1 else " (one seed)"
    text = f"{np.mean(numbers):.3g}{spread}"
    return f"{text} ({missing} of {len(by_seed)} {format_number(None)})" if missing else text


def format_interval(estimate: Estimate | None) -> str:
    """Format a value and its interval, in bold if the interval excludes zero."""
    if estimate is None:
        return format_number(None)
    text = f"{estimate.value:+.3g} [{estimate.low:+.3g}, {estimate.high:+.3g}]"
    return f"**{text}**" if estimate.excludes_zero else text


def titles_with_arrows(metrics: Sequence[str]) -> list[str]:
    """Return metric titles, each with an arrow towards better values if the metric has a better side."""
    arrows = dict.fromkeys(protocol.LOWER_IS_BETTER, " ↓") | dict.fromkeys(protocol.HIGHER_IS_BETTER, " ↑")
    return [TITLES[metric] + arrows.get(metric, "") for metric in metrics]


def enumerate_words(words: Iterable[str]) -> str:
    """Join words as in "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
