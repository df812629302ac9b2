"""Losses by noise level: those of the evaluations, with the base beside the LoRA, and those of training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from tfm_jax.reporting import series
from tfm_jax.reporting.records import Record

TITLES = {"fm": "Flow matching loss", "tfm": "TFM loss"}
"""Name of a loss in validation.jsonl -> its name on the page."""


def build_validation(validation: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what the page shows of each loss that was evaluated.

    A loss has a `title`, its value for the base model (`base`, or None) and for the LoRA (`lora`, at `steps`), and
    `levels` if it was also evaluated by noise level; see `_by_level`.
    """
    losses = dict.fromkeys(name for record in validation for name in _dict(record, "loss"))
    return [_loss(name, validation) for name in losses]


def build_training_levels(metrics: Sequence[Record]) -> dict[str, Any] | None:
    """Return the training loss in bins of the noise level, averaged over groups of steps; None if it was not recorded.

    The result contains `sigma` (the centres of the bins), `steps` (the last ones of the groups) and
    `values[bin][group]`.
    """
    recorded = [record for record in metrics if isinstance(record.get("loss_by_level"), list)]
    table = series.rows([record["loss_by_level"] for record in recorded])
    if table is None:
        return None
    size = series.group_size(len(recorded), series.MAX_COLUMNS)
    means = series.group_means(table, size)
    steps = series.group_ends([record["step"] for record in recorded], size)
    return {"sigma": _centres(table.shape[1]), "steps": steps, "values": series.as_json(means.T)}


def _loss(name: str, validation: Sequence[Record]) -> dict[str, Any]:
    with_loss = [record for record in validation if name in _dict(record, "loss")]
    lora = [record for record in with_loss if record.get("model") == "lora"]
    base = [record for record in with_loss if record.get("model") == "base"][-1:]
    values = series.column([_dict(record, "loss") for record in base + lora], name)
    numbers = series.as_json(values)
    return {
        "title": TITLES.get(name, name),
        "base": numbers[0] if base else None,
        "steps": [record["step"] for record in lora],
        "lora": numbers[len(base) :],
        "levels": _by_level(name, base, lora),
    }


def _by_level(name: str, base: Sequence[Record], lora: Sequence[Record]) -> dict[str, Any] | None:
    """Return a loss by noise level; None if it was not evaluated that way.

    The result contains `sigma` (the centres of the bins), `base` (a value for each bin, or None), `lora[step][bin]`
    and `change[bin][step]`: by how many percent the LoRA's loss differs from the base's, or None without a base.
    """
    table = series.rows([_dict(record, "by_level").get(name) for record in (*base, *lora)])
    if table is None:
        return None
    of_base, of_lora = table[: len(base)], table[len(base) :]
    return {
        "sigma": _centres(table.shape[1]),
        "base": series.as_json(of_base[0]) if len(of_base) else None,
        "lora": series.as_json(of_lora),
        "change": series.as_json(_change(of_lora, of_base[0]).T) if len(of_base) and len(of_lora) else None,
    }


def _change(lora: Float[np.ndarray, "n bins"], base: Float[np.ndarray, "bins"]) -> Float[np.ndarray, "n bins"]:
    return 100 * (lora / np.where(base > 0, base, np.nan) - 1)


def _centres(bins: int) -> list[float]:
    """Return the centres of equal bins of the noise level, which is between 0 and 1."""
    return [round((number + 0.5) / bins, 6) for number in range(bins)]


def _dict(record: Record, name: str) -> dict[str, Any]:
    """Return a field of a record that holds further fields; an empty one if the record has no such field."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}
