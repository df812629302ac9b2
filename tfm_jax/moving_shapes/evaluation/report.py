"""Formats the comparison of generated clips with real ones as a console table and as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tfm_jax.bootstrap import CONFIDENCE, format_estimate
from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.evaluation.intervals import DIFFERENCE, Intervals
from tfm_jax.moving_shapes.evaluation.set_metrics import SET_METRICS, TITLES, Row
from tfm_jax.numbers import finite_or_none, format_number

NEED_CAPTIONS = {"colours", "shapes", "directions"}
OTHER_COLUMNS = ("reference", "floor")
"""The columns of every comparison, beside one for each set."""
NOT_MEASURED = "sensitivity of a loss to the order of frames, because measuring it needs a network"


class ClipCounts(NamedTuple):
    """The numbers of clips in a comparison."""

    generated: int
    """Number of clips in each generated set."""
    reference: int
    """Number of clips in the reference."""
    compared: int
    """Number of clips on each side when two sets are compared."""


Tables = Mapping[str, Sequence[Row]]
"""Name of a set of generated clips -> rows of its comparison; all sets are compared with the same reference."""


def format_table(tables: Tables, counts: ClipCounts) -> str:
    """Format a console table with one column for each set, one for the reference and one for the floor."""
    width = max(11, *(len(name) + 2 for name in tables))
    lines = ["".join([" " * 46, *(f"{name:>{width}}" for name in (*tables, *OTHER_COLUMNS))])]
    for rows in zip(*tables.values(), strict=True):
        values = [*(row.generated for row in rows), rows[0].reference, rows[0].floor]
        cells = "".join(f"{format_number(value, digits=4):>{width}}" for value in values)
        lines.append(f"{TITLES[rows[0].metric]:46}{cells}")
    lines += _explain_gaps(tables)
    lines += [
        f"{counts.generated} generated clips, {counts.reference} reference clips; "
        f"floor: the difference between random halves of the reference, {counts.compared} clips each",
        f"not in the table: {NOT_MEASURED}",
    ]
    return "\n".join(lines)


def _explain_gaps(tables: Tables) -> list[str]:
    """Return one line for each reason why a cell of the table has no finite number."""
    infinite, missing = False, set()
    for row in (row for table in tables.values() for row in table):
        of_sets = [row.generated, row.floor] + [row.reference] * (row.metric in SET_METRICS)
        infinite = infinite or bool(np.isinf(of_sets).any())
        if np.isnan(of_sets).any():
            missing.add(row.metric)
    reasons = [
        (infinite, "inf: at least half of the clips lose an object"),
        (True, "-: a distance needs two sets, so the reference alone has none"),
        (missing & NEED_CAPTIONS, "-: colours, shapes and directions need captions (--prompts, or a metadata.csv)"),
        (missing - NEED_CAPTIONS, "-: too few clips have every object in every frame"),
    ]
    return [reason for holds, reason in reasons if holds]


def format_intervals(tables: Tables, intervals: Intervals) -> str:
    """Format a console table of values with their intervals: a column for each set and one for the difference."""
    lines = [[f"{CONFIDENCE:.0%} bootstrap intervals over the clips", *_interval_columns(tables, intervals)]]
    for metric, found in intervals.items():
        values = [row.generated for table in tables.values() for row in table if row.metric == metric]
        if np.isnan(values).all():
            continue
        if DIFFERENCE in found:
            values.append(values[1] - values[0] if np.isfinite(values).all() else np.nan)
        cells = (format_estimate(value, interval) for value, interval in zip(values, found.values(), strict=True))
        lines.append([TITLES[metric], *cells])
    width = max(len(cell) for line in lines for cell in line[1:]) + 2
    return "\n".join(f"{title:46}" + "".join(f"{cell:>{width}}" for cell in cells) for title, *cells in lines)


def _interval_columns(tables: Tables, intervals: Intervals) -> list[str]:
    paired = any(DIFFERENCE in found for found in intervals.values())
    return [*tables, " less ".join(reversed([*tables]))] if paired else list(tables)


def to_json(tables: Tables, counts: ClipCounts, intervals: Intervals) -> str:
    """Return the comparison, its intervals and its thresholds as JSON; missing and infinite numbers become null."""
    limits = {name.lower(): value for name, value in vars(thresholds).items() if name.isupper()}
    metrics = {
        rows[0].metric: {
            **{name: finite_or_none(row.generated) for name, row in zip(tables, rows, strict=True)},
            "reference": finite_or_none(rows[0].reference),
            "floor": finite_or_none(rows[0].floor),
        }
        for rows in zip(*tables.values(), strict=True)
    }
    ends = {
        metric: {name: [finite_or_none(end) for end in interval] for name, interval in found.items()}
        for metric, found in intervals.items()
    }
    result = {
        "clips": counts._asdict(), "metrics": metrics, "intervals": ends, "not_measured": NOT_MEASURED,
        "thresholds": limits,
    }  # fmt: skip
    return json.dumps(result, indent=1) + "\n"
