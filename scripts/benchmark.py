"""Measure the speed of the package on this machine, always beside a peer that does the same work.

    python scripts/benchmark.py                             # all subjects, on a CPU
    python scripts/benchmark.py training sampling           # some of them
    python scripts/benchmark.py --output=docs/performance   # also write cpu.json and cpu.md there
    python scripts/benchmark.py --compare                   # report ratios that fell below those in docs/performance
    python scripts/benchmark.py --device=gpu training       # 1.3B and 14B in bfloat16, on an NVIDIA GPU

The peers are PyTorch, diffusers, PEFT and transformers: pip install -e '.[benchmark]'. Ours and the peer take turns in
one process, so that a busy machine slows both. Everything together takes about 15 minutes on two cores, and
4 GB in the folder for temporary files ($TMPDIR). The subjects:

matmul: what the device gives to JAX and to PyTorch. objective: the TFM path and loss, beside the official algorithm.
training: a LoRA step with each remat policy. sampling: a denoising step and a short sample. autoencoder, text_encoder:
encoding and decoding. attention: our kernel. files: loading and converting weights, exporting a LoRA. data: preparing,
opening and reading clips. startup: from the start of Python to the first step. watching: the cost of metrics,
checkpoints and validation. growth: how the time of a step grows with its sizes. choices: ours beside what they
replaced.
"""

import gc
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
from benchmarks import results
from benchmarks.sizes import SIZES, Sizes
from benchmarks.timing import Row
from tyro.conf import Positional

from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, section
from tfm_jax.errors import InputError

Subject = Literal[
    "matmul", "objective", "training", "sampling", "autoencoder", "text_encoder", "attention", "files", "data",
    "startup", "watching", "growth", "choices",
]  # fmt: skip
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}
STORED = Path(__file__).resolve().parents[1] / "docs" / "performance"


@section
class Options:
    subjects: Positional[tuple[Subject, ...]] = ()
    """What to measure; everything by default."""
    device: Literal["cpu", "gpu"] = "cpu"
    """gpu measures Wan2.1's own sizes in bfloat16."""
    output: NonEmptyPath | None = None
    """Folder to write cpu.json and cpu.md to (or gpu.json and gpu.md). Other subjects in cpu.json stay."""
    compare: bool = False
    """Compare the ratios with those in docs/performance, and exit with code 1 if one of them fell by more than 15 %."""


def main(argv: Sequence[str]) -> None:
    options = command.parse(Options, argv, "python scripts/benchmark.py", __doc__).options()
    use_device(options.device)
    stored = STORED / f"{options.device}.json"
    before = [row for row, _ in results.read(stored)] if options.compare else []
    machine = results.describe_machine(jax.devices()[0])
    rows = run(options.subjects or get_args(Subject), SIZES[options.device])
    if options.output:
        results.write(options.output, options.device, machine, rows)
    if options.compare:
        slower = results.compare(before, rows)
        print(*(slower or ["no ratio fell"]), sep="\n")
        raise SystemExit(bool(slower))


def use_device(device: str) -> None:
    """Make JAX use the device alone, and leave memory on it for PyTorch."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_platforms", PLATFORMS[device])
    try:
        jax.devices()
    except RuntimeError as error:
        raise InputError(f"--device={device}: JAX finds none ({' '.join(str(error).split())})") from None


def run(subjects: Sequence[str], sizes: Sizes) -> list[Row]:
    """Measure these subjects, and print each row as soon as it is measured."""
    rows = []
    for subject in subjects:
        try:
            module = importlib.import_module(f"benchmarks.{subject}")
        except ModuleNotFoundError as error:
            raise InputError(f"{error.name} is not installed; pip install -e '.[benchmark]'") from None
        for row in module.measure(sizes):
            print(f"{subject}: {' | '.join(cell for cell in results.cells_of(row) if cell)}", flush=True)
            rows.append(row)
        jax.clear_caches()
        gc.collect()  # networks are in cycles of references
    return rows


if __name__ == "__main__":
    command.run(main)
