"""Compile the training step of both models for a few machines, and write their rooflines into docs/performance.md.

    python scripts/rooflines.py

This takes about 20 minutes of CPU time, but can be interrupted: every plan is saved in a file, and the same command
then compiles only the missing plans. The file does not record the versions of the code and of JAX, so remove it after
changing either. No program is run, and no TPU or GPU is needed; the compilers are those of tfm-plan.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # set before JAX is imported, to leave the accelerators of this machine alone

from collections.abc import Sequence
from pathlib import Path

from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, section
from tfm_jax.planning.roofline_page import plan_cases, write_section
from tfm_jax.planning.scaling import PlanCache


@section
class Options:
    output: NonEmptyPath = Path("runs/rooflines/plans.json")
    """JSON file that keeps the plans."""
    page: NonEmptyPath = Path("docs/performance.md")
    """Page to write into, between its two lines that name this program."""
    write: bool = False
    """Compile nothing; write the section from the plans in the file."""


def execute(argv: Sequence[str]) -> None:
    options = command.parse(Options, argv, "python scripts/rooflines.py", __doc__).options()
    write_section(plan_cases(PlanCache(options.output, compile_missing=not options.write)), options.page)
    print(f"done: see {options.page}")


def main() -> None:
    command.run(execute)
