"""Formats numbers for tables and JSON files, in which a number may be missing."""

import math


def finite_or_none(value: float) -> float | None:
    """Return the value, or None for NaN and infinity, which JSON cannot represent."""
    return value if math.isfinite(value) else None


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits; return "-" for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}g}"
