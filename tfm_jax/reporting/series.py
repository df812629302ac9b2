"""Columns of numbers from the records of a run, short enough to draw. A missing number is NaN, and null on the page."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from tfm_jax.reporting.records import Record

MAX_POINTS = 10_000
"""The longest curve that a browser draws without delay. In a longer run, each point is the mean of several steps."""

MAX_COLUMNS = 100
"""The largest number of columns in a heat map of training steps."""

DIGITS = 6
"""Significant digits on the page, which no screen can show in full. They keep the page small."""


def column(records: Sequence[Record], name: str) -> Float[np.ndarray, "n"]:
    """Return one field of every record."""
    return np.array([_number(record.get(name)) for record in records], float)


def numeric_names(records: Sequence[Record]) -> list[str]:
    """Return the fields that are a number in at least one record, in the order in which they first occur."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if any(_is_number(record.get(name)) for record in records)]


def rows(lists: Sequence[Any]) -> Float[np.ndarray, "n bins"] | None:
    """Stack lists of numbers and nulls.

    The first list determines the number of bins; anything else becomes a row of NaN. Return None if there is no list.
    """
    lengths = [len(values) for values in lists if isinstance(values, list) and values]
    if not lengths:
        return None
    width = lengths[0]
    fits = [isinstance(values, list) and len(values) == width for values in lists]
    empty = [None] * width
    return np.array([
        [_number(value) for value in (values if fit else empty)] for values, fit in zip(lists, fits, strict=True)
    ])  # fmt: skip


def group_size(count: int, most: int) -> int:
    """Return how many consecutive values share a point, so that `count` values become at most `most` points."""
    return max(1, -(-count // most))


def group_means(values: Float[np.ndarray, "n *bins"], size: int) -> Float[np.ndarray, "m *bins"]:
    """Return the mean of every `size` consecutive values, without those that are NaN. The last group may be smaller."""
    missing = -len(values) % size
    padded = np.concatenate([values, np.full((missing, *values.shape[1:]), np.nan)])
    grouped = padded.reshape(-1, size, *values.shape[1:])
    known = np.isfinite(grouped)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, grouped, 0).sum(1) / np.maximum(count, 1), np.nan)


def group_ends(steps: Sequence[int], size: int) -> list[int]:
    """Return the last step of every group of `group_means`."""
    return [steps[min(start + size, len(steps)) - 1] for start in range(0, len(steps), size)]


def as_json(values: Float[np.ndarray, "*any"]) -> Any:
    """Return nested lists of rounded numbers, with None for what is not finite."""
    if values.ndim > 1:
        return [as_json(part) for part in values]
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else np.nan
