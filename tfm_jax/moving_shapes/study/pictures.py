"""Draws the pictures of a study: the samples of each arm for a prompt, and the differences between arms."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from tfm_jax import video
from tfm_jax.moving_shapes.study.statistics import Estimate

FRAMES = 9
"""Maximum number of frames to show of each clip."""
CELL = 64
"""Width of a shown frame in pixels."""


def draw_prompt(clips: Mapping[str, np.ndarray], file: Path) -> None:
    """Draw one labelled row for each clip."""
    sheet = video.contact_sheet(list(clips.values()), list(clips), columns=FRAMES, cell=CELL)
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(file, optimize=True)


def draw_differences(panels: Mapping[str, Mapping[str, Estimate]], file: Path) -> None:
    """Draw one panel per metric; for every arm, it shows the difference for each seed, their mean and its interval."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (title, estimates) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, title, estimates)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _draw_panel(axis: Axes, title: str, estimates: Mapping[str, Estimate]) -> None:
    rows = range(len(estimates))
    axis.axvline(0, color="grey", linewidth=1)
    for row, estimate in zip(rows, estimates.values(), strict=True):
        axis.plot([estimate.low, estimate.high], [row, row], color="C0", linewidth=2)
        axis.plot(estimate.values, [row] * len(estimate.values), ".", color="C7")
        axis.plot(estimate.value, row, "o", color="C0")
    axis.set_yticks(rows, list(estimates))
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10)
