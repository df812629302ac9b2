"""Computes confidence intervals over the clips, for single sets and for the difference between two."""

from collections.abc import Mapping, Sequence

import numpy as np

from tfm_jax.bootstrap import Interval, bootstrap_interval
from tfm_jax.moving_shapes.evaluation.set_metrics import SET_METRICS, ClipSet

METRICS = ("residual", "faithful", "shapes", "colours", "whole", "directions")
"""The metrics that have intervals."""
DIFFERENCE = "difference"
"""Name of the second set less the first."""

Intervals = dict[str, dict[str, Interval]]
"""Metric -> name of a set, or DIFFERENCE -> interval."""


def measure_intervals(sets: Mapping[str, ClipSet], paired: bool) -> Intervals:
    """Return the intervals of every set and, if `paired`, of the difference between the two sets.

    Args:
        paired: there are two sets, and clips with the same position in them have the same prompt.
    """
    found = {metric: {name: _interval(metric, [clips]) for name, clips in sets.items()} for metric in METRICS}
    if paired:
        for metric, intervals in found.items():
            intervals[DIFFERENCE] = _interval(metric, list(sets.values()))
    return found


def _interval(metric: str, sets: Sequence[ClipSet]) -> Interval:
    """Return the interval of a metric of one set, or of its difference between two sets.

    A resample draws prompts, so it has the same prompts in both sets. The difference between two medians is not the
    median of the differences, but it is what the table shows, and it is defined more often if residuals are infinite.
    """
    average = SET_METRICS[metric].average
    values = np.stack([SET_METRICS[metric].values(clips) for clips in sets], -1)

    def statistic(values: np.ndarray, axis: int) -> np.ndarray:
        first, *second = np.moveaxis(average(values, axis=axis), -1, 0)
        with np.errstate(invalid="ignore"):  # inf - inf is undefined, which the bootstrap expects
            return second[0] - first if second else first

    return bootstrap_interval(values, statistic)
