"""Compile the training step of both models for many machines, and write docs/scaling.md with its picture.

    python scripts/scaling.py

It takes hours and can be interrupted: every plan is kept in a file, and a later start goes on with what is missing.
Remove the file after a change of the code or of JAX: it does not know what made it. `--write` writes the page from the
plans that there are. Nothing is run, and no TPU or GPU is needed; the compilers are those of scripts/plan.py.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: what this machine has is not touched

from collections.abc import Sequence
from pathlib import Path

from tfm_jax import cli
from tfm_jax.errors import InputError
from tfm_jax.planning.scaling import PlanCache, best_plans, remat_plans, scaling_curves, write_document


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling/plans.json"), help="the plans so far")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of scaling.md")
    parser.add_argument("--tries", type=int, default=3, help="meshes of each row (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    options = parser.parse_args(argv)
    if options.tries < 1:
        raise InputError(f"--tries={options.tries}: expected 1 or more")
    cache = PlanCache(options.output, compile_missing=not options.write)
    rows = list(best_plans(cache, options.tries))
    by_policy, curves = remat_plans(cache), scaling_curves(cache)
    command = f"python scripts/scaling.py --tries={options.tries}"
    print(f"done: see {write_document(rows, by_policy, curves, options.docs, command)}")


if __name__ == "__main__":
    cli.run(main)
