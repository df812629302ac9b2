"""Meshes and remat policies for a topology: the most promising are compiled, and those that fit are ranked."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jax.sharding import AbstractMesh

from tfm_jax.config import MeshConfig, Remat
from tfm_jax.errors import CompilerError, InputError
from tfm_jax.planning import programs
from tfm_jax.planning.chips import Topology
from tfm_jax.planning.plan import Plan, flops, gib, make_plan
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.sharding import MESH_AXES, num_slices

RULE = "memory to spare (more than a margin first), then recomputed operations, then bytes that a device sends per clip"

KEPT: dict[Remat, int] = {"none": 60, "attention": 3, "full": 1}
"""How many activations of a block each policy saves, as found by compiling, from the policy that recomputes least to
the one that saves least. Offloading is only tried when asked for by name: a compiler cannot tell whether its traffic
overlaps with the arithmetic."""

AT_WORK = 25
"""Activations of the one block that is being computed, as found by compiling."""

HOPELESS = 2
"""A policy is not compiled where the rough estimate of its memory exceeds the device's this many times."""

Run = TrainPlan | SamplePlan


class Candidate(NamedTuple):
    """A mesh, and what decides how early it is compiled. All numbers are rough."""

    mesh: MeshConfig
    arguments: int
    """Bytes of the frozen weights on a device."""
    memory: tuple[int, ...]
    """Bytes on a device, by policy."""
    sent: int
    """Bytes that a device sends for a clip."""

    def order(self, available: int) -> tuple[int, int, int]:
        """Sorts meshes by the first policy whose memory seems to fit, then by what they send. Meshes on which no policy
        seems to fit come last, by their memory."""
        fitting = [place for place, memory in enumerate(self.memory) if memory < available]
        return (fitting[0], 0, self.sent) if fitting else (len(self.memory), self.memory[-1], self.sent)


def search(
    run: Run,
    topology: Topology,
    tries: int,
    policies: Sequence[Remat] = tuple(KEPT),
    make: Callable[[Run, Topology], Plan] = make_plan,
) -> list[Plan]:
    """The plans that fit, best first by `RULE`; if none fits, the plan closest to fitting.

    For each mesh the policies are compiled in order, up to the first that fits; a policy that recomputes more than the
    best plan so far, or that is hopeless by a rough estimate, is left out. Progress is printed on the error stream.

    Args:
        tries: the largest number of meshes to compile, the most promising first.
        policies: remat policies to try, from the one that recomputes least.
        make: compiles a program.

    Raises:
        InputError: no mesh of these devices can split the model, the clip and the batch.
        CompilerError: the compiler failed on all of them.
    """
    if tries < 1:
        raise InputError(f"--search={tries}: expected the number of meshes to compile, 1 or more")
    found = candidates(run, topology)
    count = min(tries, len(found))
    _report(f"{topology.name}: {len(found)} meshes can hold the weights; compiling the {count} most promising")
    plans: list[Plan] = []
    for number, candidate in enumerate(found[:tries], 1):
        for variant in _variants(run, candidate, policies, topology.memory):
            best = min((plan.recomputed for plan in plans if plan.fits and not plan.tight), default=math.inf)
            if _recomputed(variant, topology) > best:
                break
            name = f"{number}/{count} {_name(variant)}"
            _report(f"{name}: compiling, which can take minutes")
            try:
                plan = make(variant, topology)
            except CompilerError as error:
                _report(f"{name}: {error}")
                continue
            room = f"{gib(-plan.over)} to spare" if plan.fits else f"{gib(plan.over)} over"
            _report(f"{name}: {room}, compiled in {plan.compile_seconds:.0f} s")
            plans.append(plan)
            if plan.fits and not plan.tight:
                break
    if not plans:
        raise CompilerError(f"the compiler failed on every mesh for {topology.name}")
    fitting = [plan for plan in plans if plan.fits]
    return sorted(fitting, key=lambda plan: (plan.tight, plan.recomputed, plan.sent / plan.clips)) or [
        min(plans, key=lambda plan: plan.over)
    ]


def candidates(run: Run, topology: Topology) -> list[Candidate]:
    """Meshes that split everything evenly and hold the weights, the most promising first.

    Raises:
        InputError: there is none.
    """
    found, slices = [], num_slices(topology.devices)
    for sizes in _factors(len(topology.devices), len(MESH_AXES)):
        mesh = MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True)))
        try:
            programs.check(run, AbstractMesh(sizes, MESH_AXES))
        except InputError:
            continue
        candidate = _rate(run, mesh)
        divides = run.model.dim % (mesh.fsdp * mesh.sequence) == run.model.ffn_dim % mesh.tensor == 0
        if divides and mesh.data % slices == 0 and candidate.arguments < topology.memory:
            found.append(candidate)
    if not found:
        devices = f"{len(topology.devices)} devices of {gib(topology.memory)}"
        batch = f"a batch of {run.train.batch_size}, " if isinstance(run, TrainPlan) else ""
        raise InputError(
            f"--topology={topology.name}: no mesh of {devices} holds the weights and splits {batch}{run.model.heads} "
            f"heads and {programs.tokens(run)} tokens; expected more devices, or another train.batch_size"
        )
    return sorted(found, key=lambda candidate: candidate.order(topology.memory))


def _variants(run: Run, candidate: Candidate, policies: Sequence[Remat], available: int) -> Iterator[Run]:
    """The program on the candidate's mesh, once for each policy that is worth compiling; at least the last one is."""
    run = dataclasses.replace(run, mesh=candidate.mesh)
    if isinstance(run, SamplePlan):
        yield run
        return
    estimates = dict(zip(KEPT, candidate.memory, strict=True))
    for remat in policies:
        if remat == policies[-1] or estimates.get(remat, 0) <= HOPELESS * available:
            yield dataclasses.replace(run, train=dataclasses.replace(run.train, remat=remat))


def _recomputed(run: Run, topology: Topology) -> int:
    return flops(run, topology, run.train.batch_size)["recomputed"] if isinstance(run, TrainPlan) else 0


def _rate(run: Run, mesh: MeshConfig) -> Candidate:
    """Layers trade activations along `sequence` and sum them along `tensor`.

    A step gathers the weights for the forward pass and for the backward pass, which uses them to recompute too; the
    activations travel in all three.
    """
    model = run.model
    width = 2 if model.dtype == "bfloat16" else 4
    weights = width * model.layers * (8 * model.dim**2 + 2 * model.dim * model.ffn_dim) / mesh.tensor
    shares = mesh.fsdp * mesh.sequence
    batch = run.train.batch_size if isinstance(run, TrainPlan) else mesh.data * mesh.fsdp
    tokens = batch / (mesh.data * mesh.fsdp) * programs.tokens(run) / mesh.sequence
    activation = width * tokens * model.dim
    if isinstance(run, TrainPlan):
        gathers, passes, kept = 2, 3, [blocks * model.layers for blocks in KEPT.values()]
    else:
        gathers, passes, kept = 1, 1, [0]
    ring = model.heads // mesh.tensor % mesh.sequence != 0
    trades = 2 * (mesh.sequence - 1) if ring else 4 * (1 - 1 / mesh.sequence)
    traded = model.layers * activation * (trades / mesh.tensor + 3 * 2 * (1 - 1 / mesh.tensor))
    sent = gathers * weights * (1 - 1 / shares) + passes * traded
    memory = tuple(round(weights / shares + activation * (blocks + AT_WORK)) for blocks in kept)
    return Candidate(mesh, round(weights / shares), memory, round(sent / batch))


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered product."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    for sizes in itertools.product(divisors, repeat=parts - 1):
        if number % math.prod(sizes) == 0:
            yield (number // math.prod(sizes), *sizes)


def options(plan: Plan) -> list[str]:
    """The command-line options that give a program the mesh and the policy of a plan."""
    mesh = [f"--mesh.{axis}={size}" for axis, size in plan.mesh.items()]
    return mesh if plan.remat is None else [*mesh, f"--train.remat={plan.remat}"]


def _name(run: Run) -> str:
    mesh = " ".join(f"{axis}={getattr(run.mesh, axis)}" for axis in MESH_AXES)
    return f"{mesh} remat={run.train.remat}" if isinstance(run, TrainPlan) else mesh


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
