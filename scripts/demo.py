"""Run the whole pipeline on the embedded model: clips, latents, TFM training, LoRA, videos.

    python scripts/demo.py

The embedded model knows only uniform motion; the demo fine-tunes it on clips of shapes that bounce off the walls. It
runs the same programs as a real fine-tuning, prints each command, and writes everything into runs/demo/, which it
deletes first. This takes minutes on two CPU cores.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from tfm_jax import config, video
from tfm_jax.cli import command
from tfm_jax.data.metadata import read_metadata
from tfm_jax.moving_shapes.numbers import format_number
from tfm_jax.moving_shapes.world import write_clips
from tfm_jax.prompts import write_prompts
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("runs/demo")
CONFIG = "wan_tiny"
LAW = "bouncing"
"""A law of motion that the embedded model does not know."""
CLIP_SETS = {"clips": (64, 1), "reference": (64, 2)}
"""Folder -> number and seed of its real clips: the first folder is for training, the second for comparison."""
NUM_PROMPTS = 16
"""Number of captions of reference clips that are used as prompts."""
NUM_SHOWN = 4
"""Number of prompts, counted from the first, for which report.png shows clips."""


@config.section
class Options:
    """The demo has no options."""


def main(argv: Sequence[str]) -> None:
    command.parse(Options, argv, "python scripts/demo.py", __doc__)
    if (ROOT / DEMO).exists():
        shutil.rmtree(ROOT / DEMO)  # if this fails, the demo stops: it must not continue with old files
    for name, (count, seed) in CLIP_SETS.items():
        print(f"making {count} clips of {LAW} shapes in {DEMO / name}/", flush=True)
        write_clips(ROOT / DEMO / name, count, seed=seed, laws=[LAW], num_objects=[1])
    captions = [row.prompt for row in read_metadata(ROOT / DEMO / "reference")]
    write_prompts(ROOT / DEMO / "prompts.txt", captions[:NUM_PROMPTS])

    run_program("tfm-prepare", "--config", CONFIG)
    run_program("tfm-train", "--config", CONFIG)
    run_program("tfm-export", str(DEMO), str(DEMO / "lora.safetensors"))
    folders = {name: DEMO / "samples" / name for name in ("base", "lora")}
    run_program("tfm-sample", "--config", CONFIG, f"--sampling.output={folders['base']}")
    run_program("tfm-sample", "--config", CONFIG, f"--sampling.output={folders['lora']}",
                f"--sampling.lora={DEMO}/lora.safetensors")  # fmt: skip
    run_program("tfm-evaluate", *map(str, folders.values()), f"--reference={DEMO}/reference",
                f"--prompts={DEMO}/prompts.txt", f"--json={DEMO}/evaluation.json")  # fmt: skip
    draw_report(ROOT / DEMO)
    print(f"done: see {DEMO}/report.png and {DEMO}/samples/")


def run_program(name: str, *arguments: str) -> None:
    """Run a program in the root of the repository, as a user would; if it fails, exit with the same code."""
    print(f"\n$ {name} {shlex.join(arguments)}", flush=True)
    done = subprocess.run([Path(sys.executable).with_name(name), *arguments], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)  # a signal, as a shell reports it


def draw_report(demo: Path) -> None:
    """Draw report.png: the losses of every step, the motion metrics, and frames of samples and of real clips."""
    figure, axes = plt.subplot_mosaic(
        [["loss", "samples"], ["table", "samples"]], figsize=(17, 11), width_ratios=(1, 1), layout="constrained"
    )
    draw_losses(axes["loss"], read_metrics(demo / "metrics.jsonl"))
    draw_table(axes["table"], json.loads((demo / "evaluation.json").read_text(encoding="utf-8"))["metrics"])

    clip = config.load(SampleRun, CONFIG).clip
    folders = {"base": demo / "samples" / "base", "LoRA": demo / "samples" / "lora", "real": demo / "reference"}
    clips, labels = [], []
    for number in range(NUM_SHOWN):
        for source, folder in folders.items():
            file = video.find_clips(folder)[number]
            clips.append(video.read_clip(file, clip.frames, clip.height, clip.width, clip.rate))
            labels.append(f"{number:03d} {source}")
    axes["samples"].imshow(video.contact_sheet(clips, labels, columns=9, cell=96))
    axes["samples"].set(title="samples from the same noise, and a real clip with this caption", xticks=[], yticks=[])
    figure.savefig(demo / "report.png", dpi=110)


def draw_losses(axis: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    metrics = [line for line in metrics if not line.get("skipped")]
    steps = [line["step"] for line in metrics]
    for color, name in zip(("C0", "C1", "C2"), ("loss", "direction", "residual"), strict=True):
        values = [line[name] for line in metrics]
        axis.plot(steps, values, color=color, alpha=0.2)
        axis.plot(steps, running_mean(values), color=color, label=name)
    axis.set(xlabel="step", yscale="log", title="training")
    axis.legend()


def draw_table(axis: Axes, metrics: dict[str, dict[str, Any]]) -> None:
    """Draw the most important rows of evaluation.json as a table."""
    rows = {
        "objects kept in every frame": "tracked", "physics residual, pixels": "residual",
        "residual below half a pixel": "faithful", "speed, pixels per frame": "speed", "right colours": "colours",
        "right shapes": "shapes", "right directions": "directions", "Frechet motion distance": "frechet",
    }  # fmt: skip
    columns = ("base", "lora", "reference", "floor")
    cells = [[format_number(metrics[name].get(column)) for column in columns] for name in rows.values()]
    table = axis.table(
        cells, rowLabels=list(rows), colLabels=columns, loc="center", bbox=Bbox.from_bounds(0.45, 0, 0.55, 1)
    )
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    axis.set_axis_off()


def running_mean(values: list[float], window: int = 20) -> np.ndarray:
    """Return, for each value, the mean of itself and up to `window - 1` values before it."""
    total = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


if __name__ == "__main__":
    command.run(main)
