"""The curves of training: one panel for each quantity, over the steps."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfm_jax.reporting import series
from tfm_jax.reporting.records import Record

NO_CURVES = {"step", "skipped", "clips", "bad_steps", "loss_by_level"}
"""Fields of metrics.jsonl that are not drawn as curves."""


class Panel(NamedTuple):
    """A chart on the page."""

    title: str
    caption: str
    """What the curves mean."""
    names: Mapping[str, str]
    """Field of metrics.jsonl -> name of the curve."""
    unit: str = ""
    scale: float = 1
    """The field is multiplied by this, to be in the unit."""


LOSS = Panel(
    "Loss",
    "What training minimises, and the terms that it is made of, as means over the clips of a step. Each step draws new "
    "clips and noise levels, so the faint line jumps; the bold one shows the trend. It should fall quickly at first, "
    "then slowly. Fine-tuning changes the loss much less than the samples: look at those, too.",
    {"loss": "loss"},
)
"""This panel also shows every field that no other panel names: the terms of the loss, which differ by objective."""

OTHERS = (
    Panel(
        "Gradient norm",
        "How strongly the clips of a step pull on the adapters, before clipping. Single peaks are normal. A line that "
        "keeps rising means that training is becoming unstable: lower the learning rate.",
        {"grad_norm": "gradient norm"},
    ),
    Panel(
        "Update norm",
        "How far a step moved the adapters. It follows the learning rate, because AdamW scales the gradient to about "
        "the same size in every step.",
        {"update_norm": "norm of the update"},
    ),
    Panel(
        "Learning rate",
        "How far a step follows the gradient. It grows during the warm-up and then follows optimizer.schedule.",
        {"learning_rate": "learning rate"},
    ),
    Panel(
        "Throughput",
        "Clips per second over all devices. A level line is what you want.",
        {"clips_per_second": "clips per second"},
        "clips / s",
    ),
    Panel(
        "Time per step",
        "Seconds for a step, and how much of them training waited for clips from disk. If the waiting is a large part, "
        "the data are too slow, not the devices.",
        {"seconds": "step", "data_wait": "waiting for data"},
        "s",
    ),
    Panel(
        "Computation",
        "Operations of the model per second on each chip, in units of 10^12, as counted by our formula.",
        {"tflops": "TFLOP/s per chip"},
        "TFLOP/s",
    ),
    Panel(
        "Utilisation",
        "The operations of the model per second (MFU), as a part of what the chip can do at most.",
        {"mfu": "MFU"},
        "%",
        100,
    ),
    Panel(
        "Device memory",
        "The most memory that the program has used on a device so far. It should stay level after the first steps.",
        {"memory_bytes": "memory"},
        "GiB",
        1 / 2**30,
    ),
)


def build_curves(metrics: Sequence[Record]) -> dict[str, Any]:
    """Return the panels that have data.

    The result contains `steps`, `panels` (title, caption, unit and curves, each with its name and its values at
    `steps`), and `per_point`: of how many steps every value is the mean.
    """
    size = series.group_size(len(metrics), series.MAX_POINTS)
    numbers = {name: series.column(metrics, name) for name in series.numeric_names(metrics) if name not in NO_CURVES}
    named = {name for panel in OTHERS for name in panel.names}
    terms = {name: name for name in numbers if name not in named}
    panels = [LOSS._replace(names={**LOSS.names, **terms}), *OTHERS]
    return {
        "steps": series.group_ends([record["step"] for record in metrics], size),
        "per_point": size,
        "panels": [_as_json(panel, numbers, size) for panel in panels if panel.names.keys() & numbers.keys()],
    }


def _as_json(panel: Panel, numbers: Mapping[str, np.ndarray], size: int) -> dict[str, Any]:
    curves = []
    for name, label in panel.names.items():
        if name in numbers:
            values = series.as_json(series.group_means(numbers[name] * panel.scale, size))
            curves.append({"name": label, "values": values})
    return {"title": panel.title, "caption": panel.caption, "unit": panel.unit, "curves": curves}
