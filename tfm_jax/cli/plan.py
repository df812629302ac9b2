"""Check whether a run fits on a machine that is not available here, by compiling its programs.

    tfm-plan --config wan2.1_t2v_14b --topology=v5e:4x4 --mesh.fsdp=4 --mesh.sequence=4
    tfm-plan --config wan2.1_t2v_14b --topology=v6e:2x4 --search
    tfm-plan --config wan2.1_t2v_14b --topology=h100:1 --sampling

This needs no TPU, GPU or weights; `pip install 'jax[tpu]'` installs the compiler for TPUs. The plan shows the memory
needed per device, the operations of a step, the bytes that each device sends, and the cost of compiling. It shows no
step time, because nothing is run; --roofline shows a lower bound and where it comes from. The exit code is 1 if the run
does not fit.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # set before JAX is imported, to leave the accelerators of this machine alone
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the compiler logs every program that does not fit

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tfm_jax.cli import command
from tfm_jax.config import Positive, Remat, section
from tfm_jax.errors import InputError
from tfm_jax.planning.chips import find_topology
from tfm_jax.planning.plan import Plan, describe, make_plan
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.planning.roofline_tables import describe_roofline
from tfm_jax.planning.search import RULE, SAVED_ACTIVATIONS, options, search


@section
class Options:
    config: Path
    """YAML file, or the name of a shipped configuration such as wan_tiny."""
    topology: str
    """Chips, and their number or shape: v5e:4x4, v5p:4x4x4, 2xv5e:16x16 (two slices), h100:8 and so on."""
    sampling: bool = False
    """Plan a sampling run instead of a training step: encoding the prompts, denoising and decoding. For TPUs, the
    decoder takes minutes to compile. For the options, use --sampling --help."""
    search: Annotated[Positive | None, command.ValueIfOmitted("8")] = None
    """Compile this many of the most promising meshes (8 if no number is given), each with several remat policies or
    only with that of --train.remat. Rank the plans that fit, and print the command for the best."""
    roofline: bool = False
    """Show a lower bound for the time of a step at the chip's peak rates: by class of operation, for the largest
    operations, and for the transfers between devices."""
    json: bool = False
    """Print the plan as JSON, with its roofline; for a search, the list of plans."""


@section
class TrainOptions(Options):
    run: TrainPlan


@section
class SampleOptions(Options):
    run: SamplePlan


def execute(argv: Sequence[str]) -> None:
    line = command.parse(SampleOptions if "--sampling" in argv else TrainOptions, argv, "tfm-plan", __doc__)
    chosen = line.options()
    topology = find_topology(chosen.topology)
    if chosen.search is None:
        plans = [make_plan(chosen.run, topology)]
    else:
        plans = search(chosen.run, topology, chosen.search, _policies(line, chosen.run))
    if chosen.json:
        print(json.dumps(plans[0].as_json() if chosen.search is None else [plan.as_json() for plan in plans]))
    else:
        parts = [describe, describe_roofline] if chosen.roofline else [describe]
        print("\n\n".join(part(plan) for plan in plans for part in parts))
        if chosen.search is not None:
            print(f"\nranked by {RULE}")
            print(_command(plans[0], line))
    if not any(plan.fits for plan in plans):
        sys.exit(1)


def _policies(line: command.CommandLine, run: TrainPlan | SamplePlan) -> Sequence[Remat]:
    """Return the remat policies that a search tries.

    Raises:
        InputError: the command line sets the mesh, although the search chooses it.
    """
    for name, value in line.fields.items():
        if name.startswith("mesh."):
            raise InputError(f"--{name}={value}: --search chooses the mesh; remove one of the two options")
    return [run.train.remat] if isinstance(run, TrainPlan) and "train.remat" in line.fields else [*SAVED_ACTIVATIONS]


def _command(best: Plan, line: command.CommandLine) -> str:
    """Return the line that shows the command of the best plan."""
    if not best.fits:
        return "no plan fits; the one above is the closest"
    given = [f"--{name}={value}" for name, value in line.fields.items() if name != "train.remat"]
    program = "tfm-sample" if "sampling" in line.given else "tfm-train"
    return f"to run the first plan: {shlex.join([program, '--config', line.given['config'], *given, *options(best)])}"


def main() -> None:
    command.run(execute)


if __name__ == "__main__":
    main()  # tfm_jax.planning.scaling runs this module
