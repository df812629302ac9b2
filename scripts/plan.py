"""Does a run fit on a machine that is not there? Compile its training step for it and see.

    python scripts/plan.py --config configs/wan2.1_t2v_14b.yaml --topology=v5e:4x4 --mesh.fsdp=4 --mesh.sequence=4
    python scripts/plan.py --config configs/wan2.1_t2v_14b.yaml --topology=v6e:2x4 --search

No TPU, GPU or weights are needed. The compiler for TPUs comes with `pip install 'jax[tpu]'`. Topologies are
v5e:2x4, v5p:4x4x4, 2xv5e:16x16 (two slices), h100:8 and the like. It reports the memory needed per device, the
operations of a step, what the devices send to each other, and what compiling took; never a step time, since nothing is
run. Exit code 1: it does not fit.

--sampling: a step of sampling instead. --search, or --search=N: compile the N (8) most promising meshes, with each
remat policy (or the one that --train.remat names), rank those that fit, and print the command for the best. --json: the
same for programs. Every field of the configuration can be set on the command line.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: the accelerators of this machine are not touched
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the compiler logs every program that does not fit

import json
import shlex
import sys
from collections.abc import Sequence

from tfm_jax import cli, config
from tfm_jax.config import Remat
from tfm_jax.errors import InputError
from tfm_jax.planning.chips import CHIPS, EXAMPLES, topology
from tfm_jax.planning.plan import Plan, describe, make_plan
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.planning.search import RULE, SAVED_ACTIVATIONS, options, search


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(None, add_help=False)  # the configuration's help has all
    parser.add_argument("--topology", default="")
    parser.add_argument("--sampling", action="store_true")
    parser.add_argument("--search", type=int, nargs="?", const=8)
    parser.add_argument("--json", action="store_true")
    chosen, fields = parser.parse_known_args(argv)
    run = config.parse(SamplePlan if chosen.sampling else TrainPlan, fields, "plan.py", __doc__ or "")
    if chosen.search is not None:
        _check_free(fields)
    if not chosen.topology:
        raise InputError(f"--topology is missing; expected one of {', '.join(CHIPS)} and its shape, {EXAMPLES}")
    devices = topology(chosen.topology)
    if chosen.search is None:
        plans = [make_plan(run, devices)]
    else:
        given = any(field.startswith("--train.remat") for field in fields)
        policies: Sequence[Remat] = [run.train.remat] if isinstance(run, TrainPlan) and given else [*SAVED_ACTIVATIONS]
        plans = search(run, devices, chosen.search, policies)
    if chosen.json:
        print(json.dumps(plans[0].as_json() if chosen.search is None else [plan.as_json() for plan in plans]))
    else:
        print("\n\n".join(map(describe, plans)))
        if chosen.search is not None:
            print(f"\nranked by {RULE}")
            print(_command(plans[0], fields, chosen.sampling))
    if not any(plan.fits for plan in plans):
        sys.exit(1)


def _check_free(fields: Sequence[str]) -> None:
    for field in fields:
        if field.startswith("--mesh."):
            raise InputError(f"{field}: --search chooses the mesh; leave out one of the two")


def _command(best: Plan, fields: Sequence[str], sampling: bool) -> str:
    """How to run what was planned."""
    if not best.fits:
        return "no plan fits; the one above is closest"
    given = [field for field in fields if not field.startswith("--train.remat")]
    program = "sample.py" if sampling else "train.py"
    return f"to run the first: python scripts/{program} {shlex.join([*given, *options(best)])}"


if __name__ == "__main__":
    cli.run(main)
