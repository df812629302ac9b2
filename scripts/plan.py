"""Does a run fit on a machine that is not there? Compile its training step for it and see.

    python scripts/plan.py --config configs/wan2.1_t2v_14b.yaml --topology=v5e:4x4 --mesh.fsdp=4 --mesh.sequence=4
    python scripts/plan.py --config configs/wan2.1_t2v_14b.yaml --topology=v6e:2x4 --search

No TPU or GPU is needed, nor any weights. The compiler for TPUs comes with `pip install 'jax[tpu]'`. Topologies are
v5e:2x4, v5p:4x4x4, 2xv5e:16x16 (two slices), h100:8 and the like. Told are the memory of each device, the operations of
a step, what the devices send to each other, and what compiling took; never a step time, since nothing is run. Exit code
1: it does not fit.

--sampling: a step of sampling instead. --search, or --search=N: try the N (8) meshes that look best, and the remat
policies, and rank those that fit. --json: the same for programs. Every field of the configuration can be set on the
command line.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: what this machine has is not touched

import json
import sys
from collections.abc import Sequence

from tfm_jax import cli, config
from tfm_jax.errors import InputError
from tfm_jax.planning.chips import CHIPS, EXAMPLES, topology
from tfm_jax.planning.plan import make_plan, told
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.planning.search import RULE, search


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(None, add_help=False)  # the configuration's help has all
    parser.add_argument("--topology", default="")
    parser.add_argument("--sampling", action="store_true")
    parser.add_argument("--search", type=int, nargs="?", const=8)
    parser.add_argument("--json", action="store_true")
    options, fields = parser.parse_known_args(argv)
    run = config.parse(SamplePlan if options.sampling else TrainPlan, fields, "plan.py", __doc__ or "")
    if options.search is not None:
        _check_free(fields)
    if not options.topology:
        raise InputError(f"--topology is missing; expected one of {', '.join(CHIPS)} and its shape, {EXAMPLES}")
    devices = topology(options.topology)
    plans = [make_plan(run, devices)] if options.search is None else search(run, devices, options.search)
    if options.json:
        print(json.dumps(plans[0].as_json() if options.search is None else [plan.as_json() for plan in plans]))
    else:
        print("\n\n".join(map(told, plans)))
        if options.search is not None:
            print(f"\nranked by {RULE}")
    if not any(plan.fits for plan in plans):
        sys.exit(1)


def _check_free(fields: Sequence[str]) -> None:
    for field in fields:
        if field.startswith(("--mesh.", "--train.remat")):
            raise InputError(f"{field}: --search chooses meshes and policies itself; leave out one of the two")


if __name__ == "__main__":
    cli.run(main)
