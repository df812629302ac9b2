"""Draws the demo's report: the motion in a few clips, the metrics and the loss."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from tfm_jax.moving_shapes.demo import findings
from tfm_jax.moving_shapes.demo.examples import Example, ShownClip
from tfm_jax.moving_shapes.demo.overlay import overlay

FRAMES = 6
"""Number of frames that a picture overlays."""
OUTLINE = [withStroke(linewidth=2.5, foreground="black")]
BETTER_SIDE = {title: -1 if metric == "residual" else 1 for metric, title in findings.ROWS.items()}


def draw_report(
    file: Path, law: str, examples: Sequence[Example], evaluation: dict[str, Any], steps: Sequence[dict[str, Any]]
) -> None:
    """Draw a picture of the finding.

    Args:
        evaluation: the content of evaluation.json.
        steps: the lines of metrics.jsonl.
    """
    figure = plt.figure(figsize=(10, 12.2), layout="constrained")
    figure.suptitle(findings.finding(evaluation, law), fontsize=17, fontweight="bold")
    grid = figure.add_gridspec(2, 1, height_ratios=(9, 2.6))
    top = figure.add_subfigure(grid[0])
    draw_examples(top, examples)
    left, right = figure.add_subfigure(grid[1]).subplots(1, 2, width_ratios=(2.7, 1))
    draw_table(left, evaluation)
    draw_loss(right, steps)
    top.suptitle(findings.details(evaluation, law), fontsize=11)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_examples(figure: SubFigure, examples: Sequence[Example]) -> None:
    """Draw a column for every example, with one overlaid picture for each of its clips."""
    sources = list(examples[0].clips)
    grid = figure.subplots(len(sources), len(examples), squeeze=False)
    for column, example in enumerate(examples):
        grid[0, column].set_title(fill(example.caption, 36), fontsize=8.5)
        for row, source in enumerate(sources):
            draw_clip(grid[row, column], example.clips[source])
    for row, source in enumerate(sources):
        grid[row, 0].set_ylabel(source, fontsize=16, fontweight="bold")
    figure.supxlabel(
        f"{FRAMES} frames of each clip in one picture, the path of the shape's centre, and its distance from the law.\n"
        "Base and LoRA start from the same noise; the real clip has the same caption but starts elsewhere.",
        fontsize=10,
    )


def draw_clip(axis: Axes, clip: ShownClip) -> None:
    height, width = clip.pixels.shape[1:3]
    axis.imshow(overlay(clip.pixels, FRAMES), extent=(0, width, height, 0), interpolation="bicubic")
    for path in clip.paths:
        axis.plot(*path.T, "-o", color="white", linewidth=1, markersize=3, path_effects=OUTLINE)
    text = f"{clip.residual:.1f} px" if np.isfinite(clip.residual) else "shape lost"
    axis.text(
        0.97,
        0.96,
        text,
        transform=axis.transAxes,
        ha="right",
        va="top",
        color="white",
        fontsize=11,
        path_effects=OUTLINE,
    )
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def draw_table(axis: Axes, evaluation: dict[str, Any]) -> None:
    """Draw the metrics with their intervals; a difference that excludes zero is green if it is an improvement."""
    rows = findings.table(evaluation)
    table = axis.table(
        [[cell.text for cell in cells] for cells in rows.values()], rowLabels=list(rows), colLabels=findings.COLUMNS,
        loc="center", cellLoc="center", edges="horizontal", bbox=Bbox.from_bounds(0.33, 0, 0.67, 1),
        colWidths=[0.26, 0.26, 0.34, 0.12],
    )  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for row, (title, cells) in enumerate(rows.items(), start=1):
        for column, cell in enumerate(cells):
            if cell.significant:
                better = (cell.text[0] == "-") == (BETTER_SIDE[title] < 0)
                table[row, column].set_text_props(color="tab:green" if better else "tab:red", fontweight="bold")
    axis.set_axis_off()


def draw_loss(axis: Axes, steps: Sequence[dict[str, Any]]) -> None:
    done = [line for line in steps if not line.get("skipped")]
    numbers, losses = [line["step"] for line in done], [line["loss"] for line in done]
    axis.plot(numbers, losses, color="C0", alpha=0.2)
    axis.plot(numbers, running_mean(losses), color="C0")
    axis.set(yscale="log", xlabel="training step")
    axis.set_title("loss", fontsize=10)
    axis.tick_params(which="both", labelsize=8)


def running_mean(values: Sequence[float], window: int = 20) -> np.ndarray:
    """Return, for each value, the mean of itself and up to `window - 1` values before it."""
    total = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)
