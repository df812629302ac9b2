"""Summarizes the values of videos, and formats them as a console table and as JSON."""

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tfm_jax.bootstrap import CONFIDENCE, Interval, bootstrap_interval, format_estimate
from tfm_jax.footage.measuring import TITLES, Values

REFERENCE = "reference"
"""Name of the column of real videos."""
DIFFERENCE = "difference"
"""Name of the column of the second folder less the first."""

Videos = Mapping[str, Values]
"""Name of a video -> its values."""


class Estimate(NamedTuple):
    """The mean of a metric over videos, with its bootstrap interval."""

    mean: float
    interval: Interval


Summary = Mapping[str, Estimate]
"""Metric -> estimate."""


def subtract(first: Videos, second: Videos) -> dict[str, Values]:
    """Return the values of each video in `second` less those of the video of the same name in `first`."""
    return {
        name: {metric: value - first[name][metric] for metric, value in values.items()}
        for name, values in second.items()
    }


def summarize(videos: Videos) -> dict[str, Estimate]:
    """Return the mean of every metric over the videos, with its interval."""
    found = {}
    for metric in next(iter(videos.values())):
        values = np.array([of_video[metric] for of_video in videos.values()])
        found[metric] = Estimate(float(values.mean()), bootstrap_interval(values, np.mean))
    return found


def format_table(summaries: Mapping[str, Summary]) -> str:
    """Format a console table with a row for every metric and a column for every set of videos."""
    first, second = [*summaries, ""][:2]
    titles = [f"{second} less {first}" if name == DIFFERENCE else name for name in summaries]
    rows = [[f"mean [{CONFIDENCE:.0%} interval over the videos]", *titles]]
    for metric in next(iter(summaries.values())):
        estimates = (summary[metric] for summary in summaries.values())
        rows.append([TITLES[metric], *(format_estimate(*estimate, digits=4) for estimate in estimates)])
    first_width, *widths = (max(map(len, cells)) for cells in zip(*rows, strict=True))
    return "\n".join(
        f"{title:{first_width}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for title, *cells in rows
    )


def to_json(measured: Mapping[str, Videos], summaries: Mapping[str, Summary]) -> str:
    """Return the values of every video, their means and their intervals as JSON."""
    result = {
        name: {
            "mean": {metric: estimate.mean for metric, estimate in summaries[name].items()},
            "interval": {metric: list(estimate.interval) for metric, estimate in summaries[name].items()},
            "videos": videos,
        }
        for name, videos in measured.items()
    }
    return json.dumps(result, indent=1) + "\n"
