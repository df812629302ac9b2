"""Plan both models on many machines, for docs/scaling.md.

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

from tfm_jax import config
from tfm_jax.config import Remat
from tfm_jax.console import log
from tfm_jax.errors import CompilerError, InputError
from tfm_jax.planning.chips import Topology, find_topology
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

QUANTIZED_MACHINES = {"1 x H100 80 GB": ("h100:1", 1), "v5e-8": ("v5e:2x4", 4)}
"""Name of a machine -> its topology and a batch size, for the comparison of bfloat16 and int8."""

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


class QuantizedCase(NamedTuple):
    """The machine and the weights of a row of the table about int8."""

    machine: str
    weights: str


Rows = Sequence[tuple[Case, Plan | None]]
QuantizedRows = Sequence[tuple[QuantizedCase, Plan | None]]
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
                f"{file}: not a file of plans written by this program ({error!r}); pass another --output"
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
            log(f"compiling {key}")
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
    model = [f"--model.quantize={run.model.quantize}"] if run.model.quantize else []
    if isinstance(run, TrainPlan):
        last = [f"--train.batch_size={run.train.batch_size}", f"--train.remat={run.train.remat}"]
    else:
        last = ["--sampling"]
    return [f"--topology={topology.name}", *mesh, *clip, *model, *last]


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
                run = make_run(model, resolution, batch)
                yield Case(model, resolution, machine), _best_plan(cache, model, run, topology, tries)


def quantized_plans(cache: PlanCache, tries: int) -> Iterator[tuple[QuantizedCase, Plan | None]]:
    """Yield the best plans of 14B at 480p with weights in bfloat16 and in int8."""
    for machine, (name, batch) in QUANTIZED_MACHINES.items():
        topology = find_topology(name)
        for quantize in (None, "int8"):
            run = make_run("14B", "480p", batch, {"model.quantize": quantize})
            case = QuantizedCase(machine, quantize or run.model.dtype)
            yield case, _best_plan(cache, "14B", run, topology, tries)


def _best_plan(cache: PlanCache, model: str, run: TrainPlan, topology: Topology, tries: int) -> Plan | None:
    try:
        plans = search(run, topology, tries, make=partial(cache.plan, model))
    except (LookupError, CompilerError):
        return None
    return min(plans, key=lambda plan: (plan.recomputed_flops, plan.bytes_sent))


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
            run = make_run("14B", "480p", batch, {f"mesh.{axis}": size for axis, size in mesh.items()})
            with contextlib.suppress(LookupError, CompilerError):
                curves.setdefault(curve, []).append(cache.plan("14B", run, topology))
    return curves


def remat_plans(cache: PlanCache) -> list[Plan]:
    """Return the plans of one program with every remat policy."""
    topology, plans = find_topology(REMAT_TOPOLOGY), []
    for remat in get_args(Remat):
        with contextlib.suppress(LookupError, CompilerError):
            run = make_run("1.3B", "480p", 1, {**REMAT_MESH, "train.remat": remat})
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


def make_run(model: str, resolution: str, batch: int, extra: Mapping[str, Any] = MappingProxyType({})) -> TrainPlan:
    """Return a run of a shipped configuration at a resolution, with other fields in `extra`."""
    height, width = RESOLUTIONS[resolution]
    fields = {"clip.height": height, "clip.width": width, "train.batch_size": batch, **extra}
    return config.load(TrainPlan, MODELS[model], fields)
