"""Draws the pictures of a study: metrics by length of training, differences between arms, and samples.

The samples may have stayed on the machine that made them. Pictures that cannot be drawn again are kept as they are.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from tfm_jax import video
from tfm_jax.data.metadata import read_metadata
from tfm_jax.moving_shapes.evaluation.set_metrics import TITLES
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.findings import Cell, Findings
from tfm_jax.moving_shapes.study.statistics import Estimate
from tfm_jax.moving_shapes.world import has_clips

PROMPTS_SHOWN = 2
"""Number of prompts of each law, counted from the first, for which samples are shown."""
FRAMES = 9
"""Maximum number of frames to show of each clip."""
CELL = 64
"""Width of a shown frame in pixels."""


def picture_sections(found: Findings) -> list[str]:
    """Draw all pictures, and return the sections of the report that show them."""
    folder = found.study.docs / "study"
    folder.mkdir(parents=True, exist_ok=True)
    _draw_panels(found, folder / "lengths.png", _draw_length_panel)
    _draw_panels(found, folder / "differences.png", _draw_difference_panel)
    return [
        "## By length of training\n\nMean over the seeds; the bars show the standard deviation. The dashed line is the "
        "base model, the dotted line real clips through the autoencoder.\n\n"
        "![deciding metrics by length of training](study/lengths.png)",
        f"## Seed by seed\n\nArm less `{protocol.BASELINE}` after {found.last} steps: every seed, their mean and its "
        f"interval.\n\n![differences of every seed, their mean and its interval](study/differences.png)",
        *_samples(found, folder),
    ]


# --- Figures ---------------------------------------------------------------------------------------------------------


def _draw_panels(found: Findings, file: Path, draw: Callable[[Axes, Findings, str, str], None]) -> None:
    """Draw one panel per law and deciding metric with `draw(axis, found, law, metric)`."""
    laws, metrics = found.study.size.laws, protocol.PRIMARY
    figure, axes = plt.subplots(
        len(laws), len(metrics), figsize=(5 * len(metrics), 3.4 * len(laws)), squeeze=False, layout="constrained"
    )
    for row, law in zip(axes, laws, strict=True):
        for axis, metric in zip(row, metrics, strict=True):
            draw(axis, found, law, metric)
            axis.set_title(f"{law}: {TITLES[metric]}", fontsize=10)
    if axes[0, 0].get_legend_handles_labels()[1]:
        axes[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _draw_length_panel(axis: Axes, found: Findings, law: str, metric: str) -> None:
    main = [arm for arm in found.study.arms(law) if arm not in protocol.FIRST_LAW_ONLY]  # more lines are hard to read
    for shift, arm in enumerate(main):
        by_length = {
            steps: [v for v in found.by_seed(Cell(law, steps), arm, metric).values() if v is not None]
            for steps in found.study.size.lengths
        }
        known = {steps: values for steps, values in by_length.items() if values}
        if known:
            means, spreads = ([float(of(v)) for v in known.values()] for of in (np.mean, np.std))
            shifted = [steps * 1.03**shift for steps in known]  # so that the bars of arms do not hide each other
            axis.errorbar(shifted, means, spreads, marker="o", capsize=3, label=arm)
    levels = {
        "--": found.mean(Cell(law, found.last), protocol.BASE, metric),
        ":": found.results.one("real", law=law).get("generated", {}).get(metric),
    }
    for style, level in levels.items():
        if level is not None:
            axis.axhline(level, color="grey", linestyle=style)
    axis.set_xscale("log")
    axis.set_xticks(found.study.size.lengths, map(str, found.study.size.lengths))
    axis.minorticks_off()
    axis.set_xlabel("training steps")


def _draw_difference_panel(axis: Axes, found: Findings, law: str, metric: str) -> None:
    """For every arm, draw the difference for each seed and the interval."""
    others = [arm for arm in (protocol.BASE, *found.study.arms(law)) if arm != protocol.BASELINE]
    estimates = {a: found.difference(Cell(law, found.last), a, protocol.BASELINE, metric) for a in others}
    _draw_estimates(axis, {arm: estimate for arm, estimate in estimates.items() if estimate})


def _draw_estimates(axis: Axes, estimates: Mapping[str, Estimate]) -> None:
    rows = range(len(estimates))
    axis.axvline(0, color="grey", linewidth=1)
    for row, estimate in zip(rows, estimates.values(), strict=True):
        axis.plot([estimate.low, estimate.high], [row, row], color="C0", linewidth=2)
        axis.plot(estimate.values, [row] * len(estimate.values), ".", color="C7")
        axis.plot(estimate.value, row, "o", color="C0")
    axis.set_yticks(rows, list(estimates))
    axis.invert_yaxis()


# --- Samples ---------------------------------------------------------------------------------------------------------


def _samples(found: Findings, folder: Path) -> list[str]:
    """Draw the samples of seed 0, and return the section that shows them; no section if there is no picture."""
    shown = []
    for law in found.study.size.laws:
        prompts = found.results.one("real", law=law).get("prompts", [])
        for number, prompt in enumerate(prompts[:PROMPTS_SHOWN]):
            file = folder / f"{law}_{number}.png"
            clips = _clip_files(found, law, number, prompt)
            if all(path.exists() for path in clips.values()):
                _draw_clips(found, clips, file)
            if file.exists():
                shown.append(f"**{prompt}**\n\n![{prompt}](study/{file.name})")
    if not shown:
        return []
    text = (
        f"## Samples\n\nAll samples have seed 0 and {found.last} steps of training. The first row of each picture is a "
        "real clip with the caption; the samples in the other rows start from the same noise."
    )
    return ["\n\n".join([text, *shown])]


def _clip_files(found: Findings, law: str, number: int, prompt: str) -> dict[str, Path]:
    """Map the label of every row of a picture to its video, which may not exist on this machine."""
    study, made = found.study, found.study.output / law / "held_out"
    clips = {clip.prompt: clip.path for clip in reversed(read_metadata(made))} if has_clips(made) else {}
    files = {"real": clips.get(prompt, made / "missing.mp4")}
    for arm in (protocol.BASE, *study.arms(law)):
        if "diverged" not in found.records(Cell(law, found.last), arm).get(0, {}):
            run = study.find_run(law, arm, 0)
            files[arm] = study.samples(run, run.lengths[-1]) / f"{number:03d}.mp4"
    return files


def _draw_clips(found: Findings, files: Mapping[str, Path], file: Path) -> None:
    """Draw one labelled row for each clip."""
    clip = found.study.run.clip
    clips = [video.read_clip(path, clip.frames, clip.height, clip.width, clip.rate) for path in files.values()]
    sheet = video.contact_sheet(clips, list(files), columns=FRAMES, cell=CELL)
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(file, optimize=True)
