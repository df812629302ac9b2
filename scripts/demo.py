"""The whole chain on the embedded model, in minutes on two CPU cores: clips, latents, TFM training, LoRA, videos.

    python scripts/demo.py

Runs the same programs as a real fine-tuning, shows each command, and leaves everything in runs/demo/, which it makes
anew.
"""

import csv
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tfm_jax import cli, video
from tfm_jax.config import parse
from tfm_jax.embedded.model import write_model
from tfm_jax.embedded.world import write_clips
from tfm_jax.sampling.pipeline import SampleRun

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("runs/demo")
CONFIG = "configs/wan_tiny.yaml"
CLIPS = 16
PROMPTS = 4


def main(argv: Sequence[str]) -> None:
    cli.parser(__doc__).parse_args(argv)
    shutil.rmtree(ROOT / DEMO, ignore_errors=True)
    print(f"making {CLIPS} clips and a tiny Wan2.1 with random weights in {DEMO}/", flush=True)
    write_clips(ROOT / DEMO / "clips", CLIPS, laws=["uniform"])
    captions = read_captions(ROOT / DEMO / "clips")
    write_model(ROOT / DEMO / "model", captions)
    (ROOT / DEMO / "prompts.txt").write_text("\n".join(captions[:PROMPTS]) + "\n", encoding="utf-8")

    program("prepare_data.py", "--config", CONFIG)
    program("train.py", "--config", CONFIG)
    program("export_lora.py", str(DEMO), str(DEMO / "lora.safetensors"))
    samples = f"--sampling.output={DEMO}/samples"
    program("sample.py", "--config", CONFIG, f"{samples}/base")
    program("sample.py", "--config", CONFIG, f"{samples}/lora", f"--sampling.lora={DEMO}/lora.safetensors")
    report(ROOT / DEMO)
    print(f"done: see {DEMO}/report.png and {DEMO}/samples/")


def program(name: str, *arguments: str) -> None:
    """Run one of the programs as a user would, from the top of the repository."""
    print(f"\n$ python scripts/{name} {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, f"scripts/{name}", *arguments], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def read_captions(clips: Path) -> list[str]:
    with open(clips / "metadata.csv", encoding="utf-8", newline="") as stream:
        return list(dict.fromkeys(row["prompt"] for row in csv.DictReader(stream)))


def report(demo: Path) -> None:
    """report.png: the loss of every step beside frames of the samples."""
    metrics = [json.loads(line) for line in (demo / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), width_ratios=(2, 3), layout="constrained")
    steps = [m["step"] for m in metrics]
    for color, name in zip(("C0", "C1", "C2"), ("loss", "direction", "residual"), strict=True):
        values = [m[name] for m in metrics]
        axes[0].plot(steps, values, color=color, alpha=0.2)
        axes[0].plot(steps, running_mean(values), color=color, label=name)
    axes[0].set(xlabel="step", yscale="log", title="training")
    axes[0].legend()

    settings = parse(SampleRun, ["--config", str(ROOT / CONFIG)], "demo.py", "").clip
    clips, labels = [], []
    for number in range(PROMPTS):
        for kind in ("base", "lora"):
            file = demo / "samples" / kind / f"{number:03d}.mp4"
            clips.append(video.read_clip(file, settings.frames, settings.height, settings.width, settings.fps))
            labels.append(f"{number:03d} {kind}")
    axes[1].imshow(video.contact_sheet(clips, labels))
    axes[1].set(title="samples: the base model, and with the LoRA, from the same noise", xticks=[], yticks=[])
    figure.savefig(demo / "report.png", dpi=110)


def running_mean(values: list[float], window: int = 20) -> np.ndarray:
    """The mean of each value and up to `window - 1` before it."""
    total = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


if __name__ == "__main__":
    cli.run(main)
