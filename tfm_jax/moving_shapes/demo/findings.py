"""Puts the numbers of evaluation.json into words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tfm_jax.bootstrap import CONFIDENCE
from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.evaluation.intervals import DIFFERENCE
from tfm_jax.numbers import format_number

ROWS = {
    "residual": "distance from the law, pixels",
    "faithful": f"less than {thresholds.FAITHFUL} pixels from the law",
    "whole": "one whole shape",
    "shapes": "right shape",
    "colours": "right colour",
    "directions": "right direction",
}
"""Metric -> its title in the demo. Except for the first, which is a median, they are shares of the clips."""
COLUMNS = ("base", "LoRA", "LoRA - base", "real")


class Cell(NamedTuple):
    """A cell of the table."""

    text: str
    significant: bool = False
    """Whether this is a difference whose interval excludes zero."""


def finding(evaluation: dict[str, Any], law: str) -> str:
    """Return the main result in one sentence, from the physics residual."""
    residual = evaluation["metrics"]["residual"]
    base, lora = residual["base"], residual["lora"]
    if base is None and lora is None:
        return "Both models lose the shape in at least half of the clips"
    if base is None:
        return f"With the LoRA, shapes are {lora:.2g} pixels off {law}; the base model loses most of them"
    if lora is None:
        return f"With the LoRA, most shapes are lost; those of the base model are {base:.2g} pixels off {law}"
    low, high = evaluation["intervals"]["residual"][DIFFERENCE]
    if not _excludes_zero(low, high):
        return f"No clear effect: {base:.2g} pixels off {law} without the LoRA, {lora:.2g} with it"
    side = "closer to" if lora < base else "further from"
    return f"The LoRA brings motion {side} {law}: from {base:.2g} to {lora:.2g} pixels off"


def details(evaluation: dict[str, Any], law: str) -> str:
    """Return what the finding is measured by, with the difference and its interval."""
    metrics = evaluation["metrics"]["residual"]
    difference = _cells(evaluation, "residual")[COLUMNS.index("LoRA - base")].text
    return (
        f"Distance of a shape from the closest path that {law} allows: median over {evaluation['clips']['generated']} "
        f"prompts.\nLoRA - base: {difference}, with a {CONFIDENCE:.0%} interval. "
        f"Real clips: {format_number(metrics['reference'], 2)}."
    )


def table(evaluation: dict[str, Any]) -> dict[str, Sequence[Cell]]:
    """Return the cells of every row, in the order of COLUMNS."""
    return {title: _cells(evaluation, metric) for metric, title in ROWS.items()}


def _cells(evaluation: dict[str, Any], metric: str) -> list[Cell]:
    values, intervals = evaluation["metrics"][metric], evaluation["intervals"][metric]
    base, lora = values["base"], values["lora"]
    difference = None if base is None or lora is None else lora - base
    share = metric != "residual"
    return [
        Cell(f"{_format(base, share)} {_format_ends(intervals['base'], share)}"),
        Cell(f"{_format(lora, share)} {_format_ends(intervals['lora'], share)}"),
        Cell(
            f"{_format(difference, share, '+').removesuffix('%')} {_format_ends(intervals[DIFFERENCE], share, '+')}",
            _excludes_zero(*intervals[DIFFERENCE]),
        ),
        Cell(_format(values["reference"], share)),
    ]


def _excludes_zero(low: float | None, high: float | None) -> bool:
    return (low is not None and low > 0) or (high is not None and high < 0)


def _format_ends(ends: Sequence[float | None], share: bool, sign: str = "") -> str:
    return f"[{', '.join(_format(end, share, sign).removesuffix('%') for end in ends)}]"


def _format(value: float | None, share: bool, sign: str = "") -> str:
    """Format a share in per cent, and any other number with two digits; None means that shapes are lost."""
    if value is None:
        return "inf"
    number = f"{value:{sign}.0%}" if share else f"{value:{sign}.2g}"
    return number.removeprefix("+") if not value else number
