"""Plan both models on many machines, and write docs/scaling.md with a figure.

Each program is compiled in a separate process, and the plans are saved in a file, so that an interrupted run can
continue. The file does not record the version of the code or of the compiler: start a new file after changing either.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tfm_jax import config
from tfm_jax.config import Remat
from tfm_jax.errors import CompilerError, InputError
from tfm_jax.markdown import table
from tfm_jax.planning.chips import GIB, Topology, find_topology
from tfm_jax.planning.plan import Plan
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.planning.search import Run, search
from tfm_jax.sharding import MESH_AXES

MODELS = {"1.3B": "wan2.1_t2v_1.3b", "14B": "wan2.1_t2v_14b"}
"""Model -> the name of its shipped configuration."""
RESOLUTIONS = {"480p": (480, 832), "720p": (720, 1280)}
"""Name of a resolution -> height and width in pixels."""
MACHINES = {
    "v5e-8": "v5e:2x4",
    "v5e-16": "v5e:4x4",
    "v6e-8": "v6e:2x4",
    "v5p-8 (4 chips)": "v5p:2x2x1",
    "v5p-64 (32 chips)": "v5p:2x4x4",
    "v5p-512 (256 chips)": "v5p:4x8x8",
    "tpu7x-8 (4 chips)": "tpu7x:2x2x1",
    "4 x A100 80 GB": "a100:4",
    "4 x H100 80 GB": "h100:4",
}
"""Name of a rented machine -> its topology. Names of v5p and tpu7x slices count cores, two per chip."""

SMALL_BATCH, SMALL_MACHINE = 4, 16
"""The paper's batch size, for machines with at most SMALL_MACHINE devices. Larger machines process one clip per device.
"""

CURVE_TOPOLOGIES = (
    "v5p:2x2x2",
    "v5p:2x2x4",
    "v5p:2x4x4",
    "v5p:4x4x4",
    "v5p:4x4x8",
    "v5p:4x8x8",
    "v5p:8x8x8",
    "v5p:8x8x16",
)
"""The topologies of the scaling curves."""
FIXED_BATCH = 16
"""Batch size of the second curve, on any number of chips."""

REMAT_TOPOLOGY, REMAT_MESH = "v5p:2x2x1", {"mesh.sequence": 4}
"""A topology and a mesh on which 1.3B fits with every remat policy, for one clip at 480p."""

SAMPLING_MACHINES = {
    "1 x H100 80 GB": "h100:1",
    **{machine: MACHINES[machine] for machine in ("v5e-8", "v6e-8", "v5p-8 (4 chips)")},
}
"""The machines that sampling is planned for."""


class Case(NamedTuple):
    """The model, resolution and machine of a row of the table."""

    model: str
    resolution: str
    machine: str


Rows = Sequence[tuple[Case, Plan | None]]
Curves = Mapping[str, Sequence[Plan]]


class PlanCache:
    """A file of plans. Missing plans are compiled and added.

    Args:
        compile_missing: if False, only read the file.

    Raises:
        InputError: the file does not contain plans.
    """

    def __init__(self, file: Path, compile_missing: bool = True):
        self.file = file
        self.compile_missing = compile_missing
        try:
            plans = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            self.plans = {key: Plan.from_json(values) for key, values in plans.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}: not a file of plans written by scaling.py ({error!r}); pass another --output"
            ) from None

    def plan(self, model: str, run: Run, topology: Topology) -> Plan:
        """Return the plan of a run from the file; if it is missing, compile and save it.

        Raises:
            LookupError: the plan is missing, and `compile_missing` is False.
            CompilerError: the compiler failed.
        """
        options = _options(run, topology)
        key = " ".join([model, *options])
        if key not in self.plans:
            if not self.compile_missing:
                raise LookupError(key)
            self.plans[key] = Plan.from_json(_compile(MODELS[model], options))
            self._save()
        return self.plans[key]

    def _save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self.file.with_name(self.file.name + ".part")
        partial_file.write_text(json.dumps({key: plan.as_json() for key, plan in self.plans.items()}), encoding="utf-8")
        partial_file.replace(self.file)


def _options(run: Run, topology: Topology) -> list[str]:
    mesh = [f"--mesh.{axis}={getattr(run.mesh, axis)}" for axis in MESH_AXES]
    clip = [f"--clip.height={run.clip.height}", f"--clip.width={run.clip.width}"]
    if isinstance(run, TrainPlan):
        last = [f"--train.batch_size={run.train.batch_size}", f"--train.remat={run.train.remat}"]
    else:
        last = ["--sampling"]
    return [f"--topology={topology.name}", *mesh, *clip, *last]


def _compile(file: str, options: Sequence[str]) -> dict:
    """Run `tfm-plan` with these options, and return the plan that it prints."""
    command = [sys.executable, "-m", "tfm_jax.cli.plan", "--config", file, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        raise CompilerError(f"tfm-plan exited with code {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    return json.loads(done.stdout)


def best_plans(cache: PlanCache, tries: int, machines: Iterable[str] = MACHINES) -> Iterator[tuple[Case, Plan | None]]:
    """Yield the best plan of every case, or the one closest to fitting if none fits; None if there is no plan.

    Plans that fit tightly are not ranked last here.
    """
    # Find all topologies first, so that a missing compiler is reported before anything is compiled.
    topologies = {machine: find_topology(MACHINES[machine]) for machine in machines}
    for machine, topology in topologies.items():
        batch = SMALL_BATCH if len(topology.devices) <= SMALL_MACHINE else len(topology.devices)
        for model in MODELS:
            for resolution in RESOLUTIONS:
                run = _run(model, resolution, batch)
                try:
                    plans = search(run, topology, tries, make=partial(cache.plan, model))
                    best = min(plans, key=lambda plan: (plan.recomputed_flops, plan.bytes_sent))
                except (LookupError, CompilerError):
                    best = None
                yield Case(model, resolution, machine), best


def scaling_curves(cache: PlanCache) -> dict[str, list[Plan]]:
    """Return plans of 14B at 480p on growing numbers of chips: with one clip per chip, and with a fixed batch size."""
    curves: dict[str, list[Plan]] = {}
    for name in CURVE_TOPOLOGIES:
        topology = find_topology(name)
        chips = len(topology.devices)
        fsdp = min(chips, FIXED_BATCH)
        sequence = min(chips // fsdp, 8)
        fixed_batch_mesh = {"fsdp": fsdp, "sequence": sequence, "tensor": chips // fsdp // sequence}
        cases = {
            "one clip per chip": (chips, {"fsdp": 8}),
            f"{FIXED_BATCH} clips": (FIXED_BATCH, fixed_batch_mesh),
        }
        for curve, (batch, mesh) in cases.items():
            run = _run("14B", "480p", batch, {f"mesh.{axis}": size for axis, size in mesh.items()})
            with contextlib.suppress(LookupError, CompilerError):
                curves.setdefault(curve, []).append(cache.plan("14B", run, topology))
    return curves


def remat_plans(cache: PlanCache) -> list[Plan]:
    """Return the plans of one program with every remat policy."""
    topology, plans = find_topology(REMAT_TOPOLOGY), []
    for remat in get_args(Remat):
        with contextlib.suppress(LookupError, CompilerError):
            run = _run("1.3B", "480p", 1, {**REMAT_MESH, "train.remat": remat})
            plans.append(cache.plan("1.3B", run, topology))
    return plans


def sampling_plans(cache: PlanCache) -> Rows:
    """Return the plans of sampling with 14B. All devices share the tokens of one video."""
    rows = []
    for machine, name in SAMPLING_MACHINES.items():
        topology = find_topology(name)
        for resolution, (height, width) in RESOLUTIONS.items():
            fields = {"clip.height": height, "clip.width": width, "mesh.sequence": len(topology.devices)}
            run = config.load(SamplePlan, MODELS["14B"], fields)
            try:
                plan = cache.plan("14B", run, topology)
            except (LookupError, CompilerError):
                plan = None
            rows.append((Case("14B", resolution, machine), plan))
    return rows


def _run(model: str, resolution: str, batch: int, extra: Mapping[str, Any] = MappingProxyType({})) -> TrainPlan:
    height, width = RESOLUTIONS[resolution]
    fields = {"clip.height": height, "clip.width": width, "train.batch_size": batch, **extra}
    return config.load(TrainPlan, MODELS[model], fields)


def write_document(
    rows: Rows, by_policy: Sequence[Plan], curves: Curves, sampling: Rows, docs: Path, command: str
) -> Path:
    """Write scaling.md and scaling.png to the folder `docs`, and return the path of the page."""
    docs.mkdir(parents=True, exist_ok=True)
    draw(curves, docs / "scaling.png")
    file = docs / "scaling.md"
    file.write_text(_document(rows, by_policy, curves, sampling, command), encoding="utf-8")
    return file


COLUMNS = ("machine", "model", "resolution", "batch", "data x fsdp x sequence x tensor", "remat", "GiB per device",
           "GiB over", "PFLOP", "recomputed PFLOP", "GiB sent", "CPU s")  # fmt: skip

SAMPLING_COLUMNS = ("machine", "resolution", "transformer", "text encoder", "autoencoder", "encoding", "denoising",
                    "decoding", "GiB available", "GiB over", "PFLOP per video", "s per video")  # fmt: skip

REMAT_COLUMNS = ("remat", "GiB per device", "GiB in host memory", "recomputed PFLOP")

PAGE = """\
# What fits where

Every row of the first table is the training step of `tfm-train`: LoRA of rank 32 on all linear layers, 81 frames,
AdamW, bfloat16 weights. The programs, also those for [sampling](#sampling), were compiled without the hardware
and not run, so there are no step times. This command makes the page; after an interruption, the same command continues
where it stopped:

    {command}

To compile a single row, pass its mesh and its remat policy to `tfm-plan`:

    tfm-plan --config wan2.1_t2v_14b --topology=v5e:4x4 --mesh.fsdp=4 --mesh.sequence=4 \\
        --train.remat=attention

Of the meshes and remat policies tried, a row shows the fitting plan with the fewest recomputed operations; ties are
broken by the fewest bytes sent. If no plan fits, the row shows the one closest to fitting.

- GiB per device: memory needed, of the memory available. A device is one chip, or half a chip on tpu7x.
- GiB over: memory needed beyond the memory available.
- PFLOP: operations of the matrix products in the forward and backward pass, summed over all devices.
- recomputed PFLOP: operations that the remat policy repeats in the backward pass, summed over all devices.
- GiB sent: data that each device sends in a step.
- CPU s: CPU time spent on compiling, in seconds.

The memory of GPUs is an estimate: without a GPU, XLA neither tunes its kernels nor asks cuDNN how much workspace it
needs. JAX uses 3/4 of a GPU's memory unless XLA_CLIENT_MEM_FRACTION sets another fraction.

{table}

## What to save for the backward pass

The option `train.remat` selects what each block saves for the backward pass. The table is for one clip of 1.3B at 480p
on {topology} with {mesh}. It shows the memory of each chip, and the operations that all chips together
recompute in a step.

{by_policy}

## Scaling with the number of chips

These plans are for 14B at 480p on v5p with remat=full, in two series. The first has one clip per chip: fsdp is 8, and
data takes the remaining factor. The second has {batch} clips in total: first fsdp grows up to {batch}, then sequence
up to 8, then tensor.

![Memory per chip and bytes sent per chip, against the number of chips](scaling.png)

{curves}

## Sampling

These plans are for `tfm-sample` with 14B: 81 frames, 50 steps with guidance, bfloat16 weights, no LoRA, one video at a
time, whose tokens all devices share. To compile a single row:

    tfm-plan --sampling --config wan2.1_t2v_14b --topology=v5e:2x4 --mesh.sequence=8

All sizes are in GiB per device.

- transformer, text encoder, autoencoder: the weights.
- encoding, denoising, decoding: memory needed in each phase, with all weights that are then in memory. The autoencoder
  is always there, and the transformer also while frames are decoded, on the first device.
- GiB over: what the largest phase needs beyond the memory available.
- PFLOP per video: operations of the matrix products of the transformer in all steps, summed over all devices.
- s per video: these operations at the peak rate of the chips, a lower bound for the time.

{sampling}
"""


def _document(rows: Rows, by_policy: Sequence[Plan], curves: Curves, sampling: Rows, command: str) -> str:
    plans = [plan for curve in curves.values() for plan in curve]
    return PAGE.format(
        command=command,
        batch=FIXED_BATCH,
        topology=REMAT_TOPOLOGY,
        mesh=", ".join(f"{name}={value}" for name, value in REMAT_MESH.items()),
        table=table(COLUMNS, (_row(case, plan) for case, plan in rows)),
        by_policy=table(REMAT_COLUMNS, map(_policy_row, by_policy)),
        curves=table(("chips", "clips", *COLUMNS[4:7], "GiB sent"), map(_curve_row, plans)),
        sampling=table(SAMPLING_COLUMNS, (_sampling_row(case, plan) for case, plan in sampling)),
    )


def _row(case: Case, plan: Plan | None) -> tuple[str, ...]:
    names = (case.machine, case.model, case.resolution)
    if plan is None:
        return (*names, *("not compiled",) * (len(COLUMNS) - len(names)))
    over = "fits" if plan.fits else f"{plan.over / GIB:.2f}"
    flops = (plan.flops["forward"] + plan.flops["backward"]) / 1e15
    recomputed = plan.recomputed_flops / 1e15
    costs = (over, f"{flops:.1f}", f"{recomputed:.1f}", _gib_sent(plan), f"{plan.cpu_seconds:.0f}")
    return (*names, *_shared_cells(plan), *costs)


def _sampling_row(case: Case, plan: Plan | None) -> tuple[str, ...]:
    names = (case.machine, case.resolution)
    if plan is None or not plan.networks or not plan.phases:
        return (*names, *("not compiled",) * (len(SAMPLING_COLUMNS) - len(names)))
    sizes = [*plan.networks.values(), *(phase.needed for phase in plan.phases.values()), plan.available]
    over = "fits" if plan.fits else f"{plan.over / GIB:.2f}"
    bound = f"{(plan.flops_per_video or 0) / 1e15:.1f}", f"{plan.seconds_per_video:.0f}"
    return (*names, *(f"{size / GIB:.2f}" for size in sizes), over, *bound)


def _policy_row(plan: Plan) -> tuple[str, ...]:
    host, recomputed = (plan.host or 0) / GIB, plan.recomputed_flops / 1e15
    return str(plan.remat), f"{plan.needed / GIB:.2f}", f"{host:.2f}", f"{recomputed:.2f}"


def _curve_row(plan: Plan) -> tuple[str, ...]:
    return str(plan.chips), *_shared_cells(plan), _gib_sent(plan)


def _shared_cells(plan: Plan) -> tuple[str, ...]:
    """Return the batch size, mesh, remat policy and memory, in the order of `COLUMNS`."""
    mesh = " x ".join(str(plan.mesh[axis]) for axis in MESH_AXES)
    memory = f"{plan.needed / GIB:.2f} of {plan.available / GIB:.2f}"
    return str(plan.clips), mesh, str(plan.remat), memory


def _gib_sent(plan: Plan) -> str:
    return "-" if plan.collectives is None else f"{plan.bytes_sent / GIB:.1f}"


def draw(curves: Curves, file: Path) -> None:
    """Plot the memory and the bytes sent per chip against the number of chips."""
    figure, (memory, sent) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for name, plans in curves.items():
        chips = [plan.chips for plan in plans]
        memory.plot(chips, [plan.needed / GIB for plan in plans], "o-", label=name)
        sent.plot(chips, [plan.bytes_sent / GIB for plan in plans], "o-", label=name)
    for axis, title in ((memory, "GiB needed per chip"), (sent, "GiB sent per chip and step")):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("v5p chips")
        axis.set_title(title, fontsize=10)
    memory.legend()
    figure.savefig(file, dpi=80)
    plt.close(figure)
