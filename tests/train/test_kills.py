"""Runs that are killed at random moments, without a warning, and started again with the same command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import virtual_devices
from helpers.paths import ROOT
from helpers.records import write_dataset
from helpers.training_runs import computed
from helpers.wan_reference import SIZES, reference_transformer

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.data.format import Record

CONFIG = SIZES["small"]
SCRIPT = ROOT / "scripts" / "train.py"
CLIP = {"frames": 5, "height": 32, "width": 32, "fps": 16.0}
PATIENCE = 900
"""Seconds to wait for a run: many times its usual time, in case the machine is busy."""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A function that starts the program with more options, on a small model, with a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("kills")
    reference_transformer(CONFIG).save_pretrained(folder / "model" / "transformer")
    rng = np.random.default_rng(0)
    records = []
    for number in range(6):
        clip = rng.standard_normal((2, 4, 4, CONFIG.channels), np.float32)
        records.append(Record(clip, rng.standard_normal((3, CONFIG.text_dim), np.float32), "", f"{number}.mp4"))
    write_dataset(folder / "latents", records, CLIP)
    values = {
        "model": {"path": str(folder / "model"), "dim": CONFIG.dim, "ffn_dim": CONFIG.ffn_dim, "heads": CONFIG.heads,
                  "layers": CONFIG.layers, "dtype": "float32"},
        "clip": CLIP,
        "data": {"path": str(folder / "latents")},
        "lora": {"rank": 2, "targets": ["self_attn.q", "ffn.2"]},
        "train": {"output": str(folder / "run"), "steps": 1, "checkpoint_every": 2},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
    environment = virtual_devices.environment(1)
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }

    def start(*options: str) -> subprocess.Popen:
        arguments = [sys.executable, str(SCRIPT), "--config", str(folder / "config.yaml"), "--resume", *options]
        log = open(folder / "log", "w")  # noqa: SIM115, closed when the process has it
        with log:
            return subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)

    start.folder = folder
    return start


def uninterrupted(start, steps: int) -> tuple[Path, float, float]:
    """Train without a kill. Returns the folder of the run, and the seconds for starting and for the steps."""
    output = start.folder / f"whole{steps}"
    begin = time.monotonic()
    process = start(f"--train.output={output}", f"--train.steps={steps}")
    while not (output / "config.yaml").exists():
        assert process.poll() is None, (start.folder / "log").read_text()
        time.sleep(0.01)
    started = time.monotonic()
    assert process.wait(PATIENCE) == 0, (start.folder / "log").read_text()
    return output, started - begin, time.monotonic() - started


def written(file: Path) -> int | None:
    """The time when a file was last written, in ns."""
    return file.stat().st_mtime_ns if file.exists() else None


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_an_uninterrupted_one(command, kills):
    steps = 12 * kills
    expected, starting, stepping = uninterrupted(command, steps)
    output = command.folder / f"killed{steps}"
    again = (f"--train.output={output}", f"--train.steps={steps}")
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moments: {seed}")  # pytest shows it with a failure
    moments = random.Random(seed)
    alive = 0  # how often the run was still alive when it was killed
    for _ in range(kills):
        before = written(output / "config.yaml")
        process = command(*again)
        if trains := moments.random() < 0.75:
            while process.poll() is None and written(output / "config.yaml") == before:
                time.sleep(0.005)
        moment = moments.uniform(0, stepping / kills if trains else starting)
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
            alive += 1
        kept = Checkpoints(output / "checkpoints").steps
        print(f"{moment:.2f} s after {'its steps began' if trains else 'the start'}: exit code {code}, {kept}")
        assert code in (0, -signal.SIGKILL), (command.folder / "log").read_text()
    assert alive >= kills // 2
    assert command(*again).wait(PATIENCE) == 0, (command.folder / "log").read_text()

    assert computed(output) == computed(expected)
    ours, theirs = (Checkpoints(folder / "checkpoints").restore() for folder in (output, expected))
    assert ours.step == theirs.step == steps
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, array in theirs.arrays.items():
        assert (np.asarray(ours.arrays[name]) == np.asarray(array)).all(), name
