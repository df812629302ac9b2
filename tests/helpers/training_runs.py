"""Training runs of a tiny transformer on random clips, for the tests of training."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from helpers.configured import configured
from helpers.records import write_dataset
from helpers.wan_reference import SIZES

from tfm_jax.arrays import DTYPES, Dtype
from tfm_jax.checkpoint import Checkpoints
from tfm_jax.data.format import Record
from tfm_jax.train.loop import train
from tfm_jax.train.metrics import read_metrics
from tfm_jax.train.run import TrainRun
from tfm_jax.train.watching import Watcher

CONFIG = SIZES["many heads"]
CLIP = {"frames": 9, "height": 32, "width": 48, "fps": 16.0}


def write_latents(
    path: Path, seed: int, sizes: Sequence[tuple[int, int, int]] = ((3, 4, 6),), dtype: Dtype = "float32"
) -> Path:
    """Write twelve prepared clips, whose latents have these sizes in turns."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(12):
        clip = rng.standard_normal((*sizes[number % len(sizes)], CONFIG.channels), np.float32)
        text = rng.standard_normal((3 + number, CONFIG.text_dim), np.float32)
        stored = (array.astype(DTYPES[dtype]) for array in (clip, text))
        records.append(Record(*stored, f"clip {number}", f"{number}.mp4"))
    write_dataset(path, records, CLIP)
    return path


def arguments(model: Path, latents: Path, folder: Path) -> list[str]:
    """Write the configuration of a run of four steps in `folder / "run"`, and return its command line."""
    values = {
        "model": {"path": str(model), "dim": CONFIG.dim, "ffn_dim": CONFIG.ffn_dim, "heads": CONFIG.heads,
                  "layers": CONFIG.layers, "dtype": "float32"},
        "clip": CLIP,
        "data": {"path": str(latents)},
        "lora": {"rank": 4, "alpha": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "train": {"output": str(folder / "run"), "steps": 4, "batch_size": 2, "checkpoint_every": 1,
                  "keep_checkpoints": 9},
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return ["--config", str(file)]


def start(options: list[str], resume: bool = False, watchers: Sequence[Watcher] = ()) -> Path:
    """Train with these options in this process, and return the folder of the run."""
    config = configured(TrainRun, options)
    train(config, resume, watchers)
    return config.train.output


def saved(output: Path, step: int) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint."""
    restored = Checkpoints(output / "checkpoints").restore(step=step)
    return {name: np.asarray(array) for name, array in restored.arrays.items()}


def computed(output: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the fields that differ from run to run."""
    measured = ("seconds", "clips_per_second", "data_wait", "tflops", "mfu", "memory_bytes")
    lines = read_metrics(output / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def validated(output: Path) -> list[dict]:
    """Return the lines of validation.jsonl."""
    return [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
