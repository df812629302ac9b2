"""Measure speed and memory on this machine. The tests time nothing: every such number comes from here.

    python scripts/benchmark.py convert --directory=/tmp

convert: a made-up Wan2.1-1.3B transformer (5.7 GB of float32, Diffusers layout) goes through convert_weights.py, and a
plain copy of the same files beside it. Needs 12 GB in --directory, where it leaves nothing. Linux only.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfm_jax import cli
from tfm_jax.wan import layouts
from tfm_jax.wan.layouts import TRANSFORMER
from tfm_jax.wan.tensors import TensorWriter
from tfm_jax.wan.transformer import TransformerConfig

WAN_1_3B = TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=30)
CONVERT = Path(__file__).resolve().with_name("convert_weights.py")


class Watched(NamedTuple):
    """What a child process took."""

    seconds: float
    anonymous: int
    """Peak of its own memory in bytes: RssAnon, which pages of mapped files are no part of."""


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="what")
    convert = commands.add_parser("convert", help="speed and memory of convert_weights.py beside a plain copy")
    convert.add_argument("--directory", type=Path, required=True, help="where 12 GB can be written")
    convert.set_defaults(run=lambda options: measure_conversion(options.directory))
    options = parser.parse_args(argv)
    options.run(options)


def measure_conversion(directory: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="benchmark.", dir=directory) as scratch:
        source = Path(scratch, "model")
        write_checkpoint(source / "transformer", WAN_1_3B)
        size = sum(file.stat().st_size for file in source.rglob("*"))
        print(f"source: {size / 1e9:.2f} GB of float32, read from the page cache")
        start = time.monotonic()
        subprocess.run(["cp", "-r", source, f"{source}-copy"], check=True)
        _report("cp", size, time.monotonic() - start)
        flush(Path(f"{source}-copy"))
        _report("cp, until it is on the disk", size, time.monotonic() - start)
        shutil.rmtree(f"{source}-copy")
        for layout in ("tfm_jax", "diffusers"):
            target = Path(scratch, layout)
            command = [sys.executable, str(CONVERT), str(source), str(target), f"--to={layout}", "--dtype=bfloat16"]
            seconds, anonymous = watch(command)
            note = f", peak RssAnon {anonymous / 1e9:.2f} GB"
            _report(f"convert_weights.py --to={layout} --dtype=bfloat16", size, seconds, note)
            shutil.rmtree(target)


def write_checkpoint(directory: Path, config: TransformerConfig) -> None:
    """A transformer of any size in the Diffusers layout, float32, every tensor another stretch of one random block."""
    rows = TRANSFORMER.rows(config)
    shapes = {name: value.shape for name, value in layouts.parameters(TRANSFORMER, config, np.float32).items()}
    expected = layouts.expected_tensors("diffusers", rows, shapes)
    block = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
    directory.mkdir(parents=True)
    values = layouts.config_json(TRANSFORMER, "diffusers", config)
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    content = {name: (shape, np.float32) for name, shape in expected.items()}
    with TensorWriter(directory, TRANSFORMER.files, content) as writer:
        for number, name in enumerate(content):
            flat, turned = writer[name].reshape(-1), np.roll(block, 7919 * number)
            for start in range(0, flat.size, block.size):
                part = flat[start : start + block.size]
                part[:] = turned[: part.size]


def watch(command: Sequence[str], interval: float = 0.05) -> Watched:
    """Run a program to its end, with a look at its memory every `interval` seconds.

    Raises:
        CalledProcessError: it failed.
    """
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(interval)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Watched(time.monotonic() - start, peak)


def anonymous_memory(pid: int) -> int:
    """RssAnon of a running process in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except ProcessLookupError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def flush(directory: Path) -> None:
    """Wait until every file in `directory` is on the disk."""
    for file in directory.rglob("*.safetensors"):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def _report(what: str, size: int, seconds: float, note: str = "") -> None:
    print(f"{what}: {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s of the source{note}", flush=True)


if __name__ == "__main__":
    cli.run(main)
