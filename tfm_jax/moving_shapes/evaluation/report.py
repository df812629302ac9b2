"""Formats the comparison of generated clips with real ones as a console table and as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.evaluation.set_metrics import SET_METRICS, TITLES, Row
from tfm_jax.moving_shapes.numbers import finite_or_none, format_number

NEED_CAPTIONS = {"colours", "shapes", "directions"}
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
    lines = ["".join([" " * 46, *(f"{name:>{width}}" for name in (*tables, "reference", "floor"))])]
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


def to_json(tables: Tables, counts: ClipCounts) -> str:
    """Return the comparison and its thresholds as JSON; missing and infinite numbers become null."""
    limits = {name.lower(): value for name, value in vars(thresholds).items() if name.isupper()}
    metrics = {
        rows[0].metric: {
            **{name: finite_or_none(row.generated) for name, row in zip(tables, rows, strict=True)},
            "reference": finite_or_none(rows[0].reference),
            "floor": finite_or_none(rows[0].floor),
        }
        for rows in zip(*tables.values(), strict=True)
    }
    result = {"clips": counts._asdict(), "metrics": metrics, "not_measured": NOT_MEASURED, "thresholds": limits}
    return json.dumps(result, indent=1) + "\n"
