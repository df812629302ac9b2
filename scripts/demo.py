"""Run the whole pipeline on the embedded model: clips, latents, TFM training, LoRA, videos.

    python scripts/demo.py

The embedded model knows only uniform motion; the demo fine-tunes it on clips of shapes that fall and bounce off the
floor. It runs the same programs as a real fine-tuning, prints each command, and writes everything into runs/demo/,
which it deletes first. This takes minutes on two CPU cores.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tfm_jax import config
from tfm_jax.cli import command
from tfm_jax.data.metadata import read_metadata
from tfm_jax.moving_shapes.demo.animation import write_animation
from tfm_jax.moving_shapes.demo.examples import read_examples
from tfm_jax.moving_shapes.demo.report import draw_report
from tfm_jax.moving_shapes.scene import ClipSpec
from tfm_jax.moving_shapes.world import write_clips
from tfm_jax.prompts import read_prompts, write_prompts
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("runs/demo")
CONFIG = "wan_tiny"
LAW = "gravity"
"""A law of motion that the embedded model does not know."""
CLIP_SETS = {"clips": (400, 1), "reference": (64, 2)}
"""Folder -> number and seed of its real clips: the first folder is for training, the second for comparison."""
WATCHING = ("--data.held_out=0.05", "--train.eval_every=400", "--train.eval_clips=8", "--train.sample_every=1000",
            f"--sampling.prompts={DEMO}/watched_prompts.txt")  # fmt: skip
"""How the training run is watched: by its loss on clips that are held out, and by samples for a few prompts."""
NUM_PROMPTS = 32
"""Number of captions of reference clips that are used as prompts; at most half of the reference clips, so that as many
are left for the noise floor."""
NUM_SHOWN = 4
"""Number of prompts, counted from the first, for which the pictures show clips, and which are sampled
during training."""


@config.section
class Options:
    """The demo has no options."""


def main(argv: Sequence[str]) -> None:
    command.parse(Options, argv, "python scripts/demo.py", __doc__)
    if (ROOT / DEMO).exists():
        shutil.rmtree(ROOT / DEMO)  # if this fails, the demo stops: it must not continue with old files
    for name, (count, seed) in CLIP_SETS.items():
        print(f"making {count} clips of shapes under the law of {LAW} in {DEMO / name}/", flush=True)
        write_clips(ROOT / DEMO / name, count, seed=seed, laws=[LAW], num_objects=[1])
    captions = [row.prompt for row in read_metadata(ROOT / DEMO / "reference")]
    write_prompts(ROOT / DEMO / "prompts.txt", captions[:NUM_PROMPTS])
    write_prompts(ROOT / DEMO / "watched_prompts.txt", captions[:NUM_SHOWN])

    run_program("tfm-prepare", "--config", CONFIG)
    run_program("tfm-train", "--config", CONFIG, *WATCHING)
    run_program("tfm-report", str(DEMO))
    run_program("tfm-export", str(DEMO), str(DEMO / "lora.safetensors"))
    folders = {name: DEMO / "videos" / name for name in ("base", "lora")}
    run_program("tfm-sample", "--config", CONFIG, f"--sampling.output={folders['base']}")
    run_program("tfm-sample", "--config", CONFIG, f"--sampling.output={folders['lora']}",
                f"--sampling.lora={DEMO}/lora.safetensors")  # fmt: skip
    run_program("tfm-evaluate", *map(str, folders.values()), "--config", CONFIG, f"--reference={DEMO}/reference",
                f"--prompts={DEMO}/prompts.txt", f"--json={DEMO}/evaluation.json")  # fmt: skip
    show(ROOT / DEMO)
    print(f"done: see {DEMO}/report.gif, {DEMO}/report.png, {DEMO}/report.html and {DEMO}/videos/")


def run_program(name: str, *arguments: str) -> None:
    """Run a program in the root of the repository, as a user would; if it fails, exit with the same code."""
    print(f"\n$ {name} {shlex.join(arguments)}", flush=True)
    done = subprocess.run([Path(sys.executable).with_name(name), *arguments], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)  # a signal, as a shell reports it


def show(demo: Path) -> None:
    """Draw report.png, report.gif and report.mp4."""
    clip = config.load(SampleRun, CONFIG).clip
    folders = {"base": demo / "videos" / "base", "LoRA": demo / "videos" / "lora", "real": demo / "reference"}
    captions = read_prompts(demo / "prompts.txt")[:NUM_SHOWN]
    examples = read_examples(folders, captions, ClipSpec(clip.frames, (clip.height, clip.width), clip.rate))
    evaluation = json.loads((demo / "evaluation.json").read_text(encoding="utf-8"))
    draw_report(demo / "report.png", LAW, examples, evaluation, read_metrics(demo / "metrics.jsonl"))
    write_animation(demo / "report", examples, clip.rate)


if __name__ == "__main__":
    command.run(main)
