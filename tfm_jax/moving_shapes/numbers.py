"""Numbers of tables and of JSON files, where one may be missing."""

import math


def finite_or_none(value: float) -> float | None:
    """None instead of NaN or infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def format_number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; "-" for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}g}"
