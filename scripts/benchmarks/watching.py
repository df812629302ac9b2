"""What metrics, checkpoints and validation cost in a run of 500 tiny steps, beside the same steps without them.

The run trains a tiny model on random latents and saves every 100 steps. Its time goes from the first step until the
last checkpoint is complete, and includes compiling what validation needs. The peer is a bare loop over the same
batches, of 100 steps. Validation evaluates one clip for the base and one for the trained adapters, each at ten noise
levels for two losses.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import ours
from benchmarks.data import write_records
from benchmarks.sizes import Sizes, Work
from benchmarks.timing import Row, pair
from benchmarks.weights import write_checkpoint
from tfm_jax.config import from_plain
from tfm_jax.data.batches import Batches
from tfm_jax.data.format import Record
from tfm_jax.data.order import is_held_out
from tfm_jax.data.records import open_records
from tfm_jax.lora.adapters import LoraSplit
from tfm_jax.sharding import one_device_mesh
from tfm_jax.train.loop import train
from tfm_jax.train.run import TrainRun
from tfm_jax.train.watching import Event, Watcher

SUBJECT, OURS, PEER = "watching", "metrics, checkpoints and validation", "a bare loop"
STEPS, BARE_STEPS, EVERY, CLIPS, HELD_OUT = 500, 100, 100, 32, 0.1
REMAT = "attention"


def measure(sizes: Sizes) -> Iterator[Row]:
    work = sizes.startup
    with tempfile.TemporaryDirectory(prefix="benchmark.") as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "model" / "transformer", work.config)
        write_clips(folder / "latents", work)
        split = ours.adapted(work, sizes)
        run, peer = watched(folder, work, sizes), bare(folder / "latents", work, split)
    times = {OURS: run / STEPS, PEER: peer / BARE_STEPS}
    for row in pair(SUBJECT, f"a step of {STEPS}, saved every {EVERY}, {work}", times, [OURS], [PEER]):
        yield row._replace(note=f"{row.seconds / row.peer_seconds - 1:+.1%} of the step's time")


class Stopwatch(Watcher):
    """Notes when the first step starts."""

    def on_event(self, event: Event) -> None:
        if event.kind == "started":
            self.started = time.perf_counter()


def watched(folder: Path, work: Work, sizes: Sizes) -> float:
    """Train as `tfm-train` does, and return the seconds from the first step to the end."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory(dir=folder) as output, open(os.devnull, "w", encoding="utf-8") as null:
        config = run_config(folder, Path(output, "run"), work, sizes)
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            train(config, watchers=[watch])
        return time.perf_counter() - watch.started


def bare(latents: Path, work: Work, split: LoraSplit) -> float:
    """Take `BARE_STEPS` steps on batches of the same clips, and return the seconds."""
    step, state = ours.training_step(split, REMAT)
    batches = Batches(open_records(latents), work.batch, 0, one_device_mesh(), work.config.text_len)
    program: Any = step
    compiled = program.lower(state, split.frozen, batches.place(batches.read(0)[0])).compile()
    start = time.perf_counter()
    for _, (_, batch, _) in zip(range(BARE_STEPS), batches.iterate(), strict=False):
        state, _ = compiled(state, split.frozen, batches.place(batch))
    jax.block_until_ready(state)
    return time.perf_counter() - start


def clip_of(work: Work) -> dict[str, int]:
    """Return the clip section of a configuration whose latents have the size of the benchmark."""
    frames, height, width = work.size
    return {"frames": 4 * (frames - 1) + 1, "height": 8 * height, "width": 8 * width}


def run_config(folder: Path, output: Path, work: Work, sizes: Sizes) -> TrainRun:
    config = work.config
    values: dict[str, Any] = {
        "model": {"path": folder / "model", "dim": config.dim, "ffn_dim": config.ffn_dim, "heads": config.heads,
                  "layers": config.layers, "dtype": sizes.dtype},
        "clip": clip_of(work),
        "data": {"path": folder / "latents", "held_out": HELD_OUT},
        "lora": {"rank": work.rank, "alpha": work.rank},
        "objective": {"kind": "fm"},
        "train": {"output": output, "steps": STEPS, "batch_size": work.batch, "checkpoint_every": EVERY,
                  "log_every": 1, "remat": REMAT, "eval_every": STEPS, "eval_clips": 1},
    }  # fmt: skip
    return from_plain(TrainRun, values, "the benchmark")


def write_clips(folder: Path, work: Work) -> None:
    rng = np.random.default_rng(0)
    names = [f"{number}.mp4" for number in range(CLIPS)]
    assert any(is_held_out(name, HELD_OUT) for name in names)
    records = [
        Record(
            rng.standard_normal((*work.size, work.config.channels), np.float32),
            rng.standard_normal((40, work.config.text_dim), np.float32),
            "prompt",
            name,
        )
        for name in names
    ]
    write_records(folder, records, "float32", copies=1, clip=clip_of(work))
