"""Starts tfm-train and other programs in several processes on virtual CPU devices."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import virtual_devices
from helpers.paths import ROOT
from helpers.records import write_dataset
from helpers.wan_reference import SIZES, reference_transformer

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.data.format import Record
from tfm_jax.data.records import open_records
from tfm_jax.errors import InputError

CONFIG = SIZES["small"]
SCRIPT = ROOT / "scripts" / "train.py"
CLIP = {"frames": 5, "height": 32, "width": 32, "fps": 16.0}
BATCH = 8
CLIPS = 24
PATIENCE = 900
"""Timeout in seconds: many times the duration of a run, because a machine may be busy."""

LOADING = """
import json, sys
from pathlib import Path
import jax
from tfm_jax import processes
from tfm_jax.config import MeshConfig
from tfm_jax.sharding import make_mesh
from tfm_jax.wan import load_transformer, sources
reads, open_tensors = {}, sources.open_tensors

def counted(files):
    def entry(name, tensor):
        def read(index):
            values = tensor.read(index)
            rows = [piece.indices(length) for piece, length in zip(index, tensor.shape)]
            whole = all(piece == (0, length, 1) for piece, length in zip(rows[1:], tensor.shape[1:]))
            reads.setdefault(name, []).append({"bytes": values.nbytes, "first": rows[0][0], "rows_are_whole": whole})
            return values
        return tensor._replace(read=read)
    return {name: entry(name, tensor) for name, tensor in open_tensors(files).items()}

sources.open_tensors = counted
with processes.distributed():
    load_transformer(sys.argv[1], "float32", make_mesh(MeshConfig(data=1, fsdp=8)))
    Path(f"{sys.argv[2]}/reads{jax.process_index()}.json").write_text(json.dumps(reads))
"""
"""Program that loads a transformer and writes a file that lists which weights its process read."""


def write_run(path: Path) -> None:
    """Write a transformer, prepared clips and the configuration of a run that shards the weights over eight devices."""
    reference_transformer(CONFIG).save_pretrained(path / "model" / "transformer")
    rng = np.random.default_rng(0)
    records = []
    for number in range(CLIPS):
        clip = rng.standard_normal((2, 4, 4, CONFIG.channels), np.float32)
        records.append(Record(clip, rng.standard_normal((3, CONFIG.text_dim), np.float32), "", f"{number}.mp4"))
    write_dataset(path / "latents", records, CLIP, per_shard=CLIPS)
    values = {
        "model": {"path": str(path / "model"), "dim": CONFIG.dim, "ffn_dim": CONFIG.ffn_dim, "heads": CONFIG.heads,
                  "layers": CONFIG.layers, "dtype": "float32"},
        "clip": CLIP,
        "data": {"path": str(path / "latents")},
        "lora": {"rank": 2, "targets": ["self_attn.q", "ffn.2"]},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"output": str(path / "run"), "steps": 1000, "batch_size": BATCH, "checkpoint_every": 1000},
        "mesh": {"data": 1, "fsdp": 8},
    }  # fmt: skip
    (path / "config.yaml").write_text(json.dumps(values))  # JSON is YAML


class Launcher:
    """Starts processes; `kill` ends those that are still running."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen] = []

    def __call__(self, count: int, command: list[str]) -> list[subprocess.Popen]:
        """Start `count` processes as one run: `launch(2, training(folder, "--train.steps=2"))`."""
        with socket.socket() as free:
            free.bind(("", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = virtual_devices.environment(8 // count)
        environment["PYTHONPATH"] = str(ROOT)
        for index in range(count):
            distributed = {
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            process = subprocess.Popen(
                [sys.executable, *command],
                env=environment | (distributed if count > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._started.append(process)
        return self._started[-count:]

    def kill(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


def training(folder: Path, *options: str) -> list[str]:
    return [str(SCRIPT), "--config", str(folder / "config.yaml"), *options]


def wait_for(condition, processes) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.1)


def lines_of(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def saved(output: Path) -> tuple[list[int], dict[str, np.ndarray]]:
    """Return the steps of the checkpoints, and the arrays of the last one."""
    checkpoints = Checkpoints(output / "checkpoints")
    return checkpoints.steps, {name: np.asarray(array) for name, array in checkpoints.restore().arrays.items()}


def damage(dataset: Path, copy: Path, clip: int) -> None:
    """Copy `dataset`, and flip one bit of the copy that damages only the clip with index `clip`."""
    shutil.copytree(dataset, copy)
    (shard,) = copy.glob("*.array_record*")
    content = shard.read_bytes()
    for place in range(0, len(content), 400):
        bad = bytearray(content)
        bad[place] ^= 4
        shard.write_bytes(bad)
        try:
            records = open_records(copy)
        except InputError:
            continue
        if damaged_clips(records) == [clip]:
            return
    pytest.fail("no bit damages this clip alone")


def damaged_clips(records) -> list[int]:
    found = []
    for clip in range(len(records)):
        try:
            records[clip]
        except InputError:
            found.append(clip)
    return found
