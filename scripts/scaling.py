"""Compile the training step of both models for many machines, and write docs/scaling.md with its picture.

    python scripts/scaling.py

It takes hours and can be interrupted: every plan is kept in a file, and a later start goes on with what is missing.
`--write` writes the page from the plans that there are. Nothing is run, and no TPU or GPU is needed; the compilers are
those that scripts/plan.py asks for.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: what this machine has is not touched

import shlex
from collections.abc import Sequence
from pathlib import Path

from tfm_jax import cli
from tfm_jax.errors import InputError
from tfm_jax.planning.scaling import MACHINES, Scaling, growth, policies, rows, write_document


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling/plans.jsonl"), help="the plans so far")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of scaling.md")
    parser.add_argument("--tries", type=int, default=3, help="meshes of each row (default: %(default)s)")
    parser.add_argument("--machines", default=",".join(MACHINES), help="rows to compile (default: all)")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    options = parser.parse_args(argv)
    for name in options.machines.split(","):
        if name not in MACHINES:
            raise InputError(f"--machines: {name!r}: expected some of {', '.join(MACHINES)}")
    scaling = Scaling(options.output, compile_missing=not options.write)
    found = list(rows(scaling, options.tries, options.machines.split(",")))
    levers, curves = policies(scaling), growth(scaling)
    command = f"python scripts/scaling.py {shlex.join(argv)}".strip()
    print(f"done: see {write_document(found, levers, curves, options.docs, command)}")


if __name__ == "__main__":
    cli.run(main)
