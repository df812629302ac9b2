"""What fits where: the plans of both models on many machines, as one document with one picture.

Every program is compiled by a process of its own, and its plan is kept in a file: a maker that was interrupted
goes on where it was. The file does not know which code and compiler it comes from: after a change of either,
begin a new one.
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
from tfm_jax.planning.chips import GIB, Topology, topology
from tfm_jax.planning.plan import Plan
from tfm_jax.planning.programs import TrainPlan
from tfm_jax.planning.search import Run, search
from tfm_jax.sharding import MESH_AXES

MODELS = {"1.3B": "wan2.1_t2v_1.3b", "14B": "wan2.1_t2v_14b"}
"""Model -> the shipped configuration."""
CLIPS = {"480p": (480, 832), "720p": (720, 1280)}
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
"""As they are rented -> topology. Google counts the cores of v5p, two a chip, in such a name."""

RULE = "operations computed again, fewest first, then bytes that a device sends for a clip"

SMALL_BATCH, SMALL = 4, 16
"""The paper's batch, on machines of up to so many devices; larger ones have a clip a device."""

GROWING = ("v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8", "v5p:8x8x16")
FIXED_BATCH = 16

POLICIES_ON, POLICIES_MESH = "v5p:2x2x1", {"mesh.sequence": 4}
"""Where even the policy that keeps everything fits: 1.3B at 480p, one clip."""


class Case(NamedTuple):
    """A row of the table."""

    model: str
    clip: str
    machine: str


Found = Sequence[tuple[Case, Plan | None]]
Curves = Mapping[str, Sequence[Plan]]


class Scaling:
    """The plans that there are, and the file they are in.

    Raises:
        InputError: the file holds something else.
    """

    def __init__(self, file: Path, compile_missing: bool = True):
        self.file = file
        self.compile_missing = compile_missing
        try:
            plans = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            self.plans = {key: Plan.from_json(values) for key, values in plans.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: not the results of scaling.py ({error!r}); name another --output") from None

    def plan(self, model: str, run: Run, where: Topology) -> Plan:
        """From the file, else compiled and written there.

        Raises:
            LookupError: it is not there and is not to be compiled.
            CompilerError: there is no plan of it.
        """
        options = _options(run, where)
        key = " ".join([model, *options])
        if key not in self.plans:
            if not self.compile_missing:
                raise LookupError(key)
            self.plans[key] = Plan.from_json(_compile(MODELS[model], options))
            self._save()
        return self.plans[key]

    def _save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = self.file.with_name(self.file.name + ".part")
        whole.write_text(json.dumps({key: plan.as_json() for key, plan in self.plans.items()}), encoding="utf-8")
        whole.replace(self.file)


def _options(run: Run, where: Topology) -> list[str]:
    assert isinstance(run, TrainPlan)
    mesh = [f"--mesh.{axis}={getattr(run.mesh, axis)}" for axis in MESH_AXES]
    clip = [f"--clip.height={run.clip.height}", f"--clip.width={run.clip.width}"]
    train = [f"--train.batch_size={run.train.batch_size}", f"--train.remat={run.train.remat}"]
    return [f"--topology={where.name}", *mesh, *clip, *train]


def _compile(file: str, options: Sequence[str]) -> dict:
    """What tfm-plan prints."""
    command = [sys.executable, "-m", "tfm_jax.cli.plan", "--config", file, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        raise CompilerError(f"tfm-plan ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    return json.loads(done.stdout)


def rows(scaling: Scaling, tries: int, machines: Iterable[str] = MACHINES) -> Iterator[tuple[Case, Plan | None]]:
    """For every case the best plan that fits, however tightly, by `RULE`; None where it has not been compiled."""
    places = {machine: topology(MACHINES[machine]) for machine in machines}  # reports a missing compiler first
    for machine, where in places.items():
        for model in MODELS:
            for clip in CLIPS:
                run = _run(model, clip, SMALL_BATCH if len(where.devices) <= SMALL else len(where.devices))
                try:
                    found = search(run, where, tries, make=partial(scaling.plan, model))
                    yield Case(model, clip, machine), min(found, key=lambda plan: (plan.recomputed, plan.sent))
                except (LookupError, CompilerError):
                    yield Case(model, clip, machine), None


def growth(scaling: Scaling) -> dict[str, list[Plan]]:
    """14B at 480p on more and more chips: one clip a chip, weights over 8; and a batch that stays."""
    curves: dict[str, list[Plan]] = {}
    for shape in GROWING:
        where = topology(shape)
        chips = len(where.devices)
        across = min(chips, FIXED_BATCH)
        sequence = min(chips // across, 8)
        cases = {
            "one clip a chip": (chips, {"fsdp": 8}),
            f"{FIXED_BATCH} clips": (
                FIXED_BATCH,
                {"fsdp": across, "sequence": sequence, "tensor": chips // across // sequence},
            ),
        }
        for name, (batch, mesh) in cases.items():
            run = _run("14B", "480p", batch, {f"mesh.{axis}": size for axis, size in mesh.items()})
            with contextlib.suppress(LookupError, CompilerError):
                curves.setdefault(name, []).append(scaling.plan("14B", run, where))
    return curves


def policies(scaling: Scaling) -> list[Plan]:
    """Of one program with every remat policy."""
    where, plans = topology(POLICIES_ON), []
    for remat in get_args(Remat):
        with contextlib.suppress(LookupError, CompilerError):
            run = _run("1.3B", "480p", 1, {**POLICIES_MESH, "train.remat": remat})
            plans.append(scaling.plan("1.3B", run, where))
    return plans


def _run(model: str, clip: str, batch: int, more: Mapping[str, Any] = MappingProxyType({})) -> TrainPlan:
    height, width = CLIPS[clip]
    fields = {"clip.height": height, "clip.width": width, "train.batch_size": batch, **more}
    return config.load(TrainPlan, MODELS[model], fields)


def write_document(found: Found, levers: Sequence[Plan], curves: Curves, docs: Path, command: str) -> Path:
    """docs/scaling.md and docs/scaling.png."""
    docs.mkdir(parents=True, exist_ok=True)
    draw(curves, docs / "scaling.png")
    file = docs / "scaling.md"
    file.write_text(_document(found, levers, curves, command), encoding="utf-8")
    return file


COLUMNS = ("machine", "model", "clip", "batch", "data x fsdp x sequence x tensor", "remat", "GiB of a device",
           "GiB over", "PFLOP", "again", "GiB sent", "CPU s")  # fmt: skip

LEVERS = ("remat", "GiB of a device", "GiB of the host", "PFLOP again")

PAGE = """\
# What fits where

Compiled, not run: every row is the training step of `scripts/train.py`, compiled for chips that were not there. LoRA of
rank 32 on all maps, 81 frames, AdamW, bfloat16 weights. No step time follows from this, and none is told.

    {command}

makes this page; it goes on where it was interrupted. A row by itself is `scripts/plan.py` with the mesh and the policy
that stand in it:

    python scripts/plan.py --config configs/wan2.1_t2v_14b.yaml --topology=v5e:4x4 --mesh.fsdp=4 --mesh.sequence=4 \\
        --train.remat=attention

Shown is the best of the meshes and remat policies tried that fits, or else the one that lacks least, by {rule}.

- GiB of a device: what the program needs, of what there is. A device is a chip; tpu7x has two a chip.
- PFLOP: products of forward and backward pass, over all devices. Again: what the remat policy adds.
- GiB sent: by one device in a step.
- CPU s: what compiling took.
- GPUs: an estimate. XLA tunes its kernels and asks cuDNN for its workspace only where a GPU is; and JAX takes 3/4 of
  the memory unless XLA_CLIENT_MEM_FRACTION says more.

{table}

## What to keep for the backward pass

1.3B at 480p, one clip on {where} with {mesh}: what each `train.remat` needs of every chip, and what all chips together
compute again in a step.

{levers}

## More and more chips

14B at 480p on v5p, remat=full: one clip a chip (fsdp=8, the rest data), and {batch} clips in all (fsdp up to {batch},
then sequence up to 8, then tensor).

![Memory and bytes sent of a chip, as chips grow](scaling.png)

{growth}
"""


def _document(found: Found, levers: Sequence[Plan], curves: Curves, command: str) -> str:
    plans = [plan for curve in curves.values() for plan in curve]
    return PAGE.format(
        command=command,
        rule=RULE,
        batch=FIXED_BATCH,
        where=POLICIES_ON,
        mesh=", ".join(f"{name}={value}" for name, value in POLICIES_MESH.items()),
        table=table(COLUMNS, (_cells(case, plan) for case, plan in found)),
        levers=table(LEVERS, map(_lever, levers)),
        growth=table(("chips", "clips", *COLUMNS[4:7], "GiB sent"), ((str(p.chips), *_facts(p)) for p in plans)),
    )


def _facts(plan: Plan) -> tuple[str, ...]:
    mesh = " x ".join(str(plan.mesh[axis]) for axis in MESH_AXES)
    memory = f"{plan.needed / GIB:.2f} of {plan.available / GIB:.2f}"
    return str(plan.clips), mesh, str(plan.remat), memory, _sent(plan)


def _sent(plan: Plan) -> str:
    return "-" if plan.collectives is None else f"{plan.sent / GIB:.1f}"


def _cells(case: Case, plan: Plan | None) -> tuple[str, ...]:
    names = (case.machine, case.model, case.clip)
    if plan is None:
        return (*names, *("not compiled",) * (len(COLUMNS) - len(names)))
    *facts, sent = _facts(plan)
    over = "fits" if plan.fits else f"{plan.over / GIB:.2f}"
    model = (plan.flops["forward"] + plan.flops["backward"]) / 1e15
    return (*names, *facts, over, f"{model:.1f}", f"{plan.recomputed / 1e15:.1f}", sent, f"{plan.cpu_seconds:.0f}")


def _lever(plan: Plan) -> tuple[str, ...]:
    host, recomputed = (f"{number:.2f}" for number in ((plan.host or 0) / GIB, plan.recomputed / 1e15))
    return str(plan.remat), f"{plan.needed / GIB:.2f}", host, recomputed


def draw(curves: Curves, file: Path) -> None:
    """Memory and bytes sent of a chip over the number of chips."""
    figure, (memory, sent) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for name, plans in curves.items():
        chips = [plan.chips for plan in plans]
        memory.plot(chips, [plan.needed / GIB for plan in plans], "o-", label=name)
        sent.plot(chips, [plan.sent / GIB for plan in plans], "o-", label=name)
    for axis, title in ((memory, "GiB needed on a chip"), (sent, "GiB sent by a chip in a step")):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("v5p chips")
        axis.set_title(title, fontsize=10)
    memory.legend()
    figure.savefig(file, dpi=80)
    plt.close(figure)
