"""Compile the training step of both models, and sampling with 14B, for many machines. Write docs/scaling.md.

    python scripts/scaling.py

This takes hours, but can be interrupted: every plan is saved in a file, and the same command then compiles only the
missing plans. The file does not record the versions of the code and of JAX, so remove it after changing either. No
program is run, and no TPU or GPU is needed; the compilers are those of tfm-plan.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # set before JAX is imported, to leave the accelerators of this machine alone

from collections.abc import Sequence
from pathlib import Path

from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, Positive, section
from tfm_jax.planning.scaling import PlanCache, best_plans, quantized_plans, remat_plans, sampling_plans, scaling_curves
from tfm_jax.planning.scaling_page import Tables, write_document


@section
class Options:
    output: NonEmptyPath = Path("runs/scaling/plans.json")
    """JSON file that keeps the plans."""
    docs: NonEmptyPath = Path("docs")
    """Folder to write scaling.md to."""
    tries: Positive = 3
    """Maximum number of meshes to compile for each row."""
    write: bool = False
    """Compile nothing; write the page from the plans in the file."""


def execute(argv: Sequence[str]) -> None:
    options = command.parse(Options, argv, "python scripts/scaling.py", __doc__).options()
    cache = PlanCache(options.output, compile_missing=not options.write)
    tables = Tables(
        best=list(best_plans(cache, options.tries)),
        quantized=list(quantized_plans(cache, options.tries)),
        by_policy=remat_plans(cache),
        curves=scaling_curves(cache),
        sampling=sampling_plans(cache),
    )
    page = f"python scripts/scaling.py --tries={options.tries}"
    print(f"done: see {write_document(tables, options.docs, page)}")


def main() -> None:
    command.run(execute)
