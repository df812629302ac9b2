"""Search for a mesh and a remat policy: compile the most promising combinations and rank those that fit."""

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

RULE = "memory margin (tight plans last), then recomputed operations, then bytes sent per device and clip"

SAVED_ACTIVATIONS: dict[Remat, int] = {"none": 60, "attention": 3, "full": 1}
"""Number of activations of shape [b s d] that each policy saves per block, measured on compiled programs. The policy
that recomputes the least comes first. Offloading is tried only if it is requested by name, because compiling does not
show whether the transfers overlap with computation."""

WORKING_ACTIVATIONS = 25
"""Number of activations of that shape that the block being computed needs, measured on compiled programs."""

MAX_OVERESTIMATE = 2
"""A policy is not compiled if the rough estimate of its memory is more than this many times the device's memory."""

Run = TrainPlan | SamplePlan


class Candidate(NamedTuple):
    """A mesh, with the rough estimates that decide the order in which meshes are compiled."""

    mesh: MeshConfig
    arguments: int
    """Size of the frozen weights, in bytes per device."""
    memory: tuple[int, ...]
    """Bytes needed per device with each policy, in the order of `SAVED_ACTIVATIONS`."""
    bytes_sent: int
    """Bytes sent per device and clip."""

    def sort_key(self, available: int) -> tuple[int, int, int]:
        """Sort meshes by the first policy that is estimated to fit, then by the bytes sent. Meshes on which no policy
        is estimated to fit come last, sorted by memory."""
        fitting = [place for place, memory in enumerate(self.memory) if memory < available]
        return (fitting[0], 0, self.bytes_sent) if fitting else (len(self.memory), self.memory[-1], self.bytes_sent)


def search(
    run: Run,
    topology: Topology,
    tries: int,
    policies: Sequence[Remat] = tuple(SAVED_ACTIVATIONS),
    make: Callable[[Run, Topology], Plan] = make_plan,
) -> list[Plan]:
    """Return the plans that fit, sorted by `RULE`, best first. If none fits, return the plan closest to fitting.

    For each mesh, the policies are compiled in order up to the first plan that fits and is not tight. A policy is
    skipped if it recomputes more than the best plan so far, or if by a rough estimate it needs far too much memory; the
    estimate does not skip the last policy. Progress is printed to stderr.

    Args:
        tries: maximum number of meshes to compile, the most promising first.
        policies: remat policies to try, in order; the one that recomputes the least comes first.
        make: compiles a program.

    Raises:
        InputError: no mesh of these devices can split the model, the clip and the batch.
        CompilerError: the compiler failed on every mesh.
    """
    if tries < 1:
        raise InputError(f"--search={tries}: expected the number of meshes to compile, at least 1")
    found = candidates(run, topology)
    count = min(tries, len(found))
    _report(f"{topology.name}: {len(found)} meshes can hold the weights; compiling the {count} most promising")
    plans: list[Plan] = []
    for number, candidate in enumerate(found[:tries], 1):
        for variant in _variants(run, candidate, policies, topology.memory):
            best = min((plan.recomputed_flops for plan in plans if plan.fits and not plan.tight), default=math.inf)
            if _recomputed_flops(variant) > best:
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
    return sorted(fitting, key=lambda plan: (plan.tight, plan.recomputed_flops, plan.bytes_sent / plan.clips)) or [
        min(plans, key=lambda plan: plan.over)
    ]


def candidates(run: Run, topology: Topology) -> list[Candidate]:
    """Return the meshes that can hold the weights and evenly split model, clip and batch, the most promising first.

    Raises:
        InputError: there is no such mesh.
    """
    found, slices = [], num_slices(topology.devices)
    for sizes in _factors(len(topology.devices), len(MESH_AXES)):
        mesh = MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True)))
        try:
            programs.check_mesh(run, AbstractMesh(sizes, MESH_AXES))
        except InputError:
            continue
        candidate = _estimate(run, mesh)
        divides = run.model.dim % (mesh.fsdp * mesh.sequence) == run.model.ffn_dim % mesh.tensor == 0
        if divides and mesh.data % slices == 0 and candidate.arguments < topology.memory:
            found.append(candidate)
    if not found:
        devices = f"{len(topology.devices)} devices with {gib(topology.memory)} each"
        batch = f"a batch of {run.train.batch_size}, " if isinstance(run, TrainPlan) else ""
        raise InputError(
            f"--topology={topology.name}: no mesh of {devices} can hold the weights and split {batch}{run.model.heads} "
            f"heads and {programs.num_tokens(run)} tokens; expected more devices or another train.batch_size"
        )
    return sorted(found, key=lambda candidate: candidate.sort_key(topology.memory))


def _variants(run: Run, candidate: Candidate, policies: Sequence[Remat], available: int) -> Iterator[Run]:
    """Yield the program on the candidate's mesh with each policy that may fit, and in any case with the last policy."""
    run = dataclasses.replace(run, mesh=candidate.mesh)
    if isinstance(run, SamplePlan):
        yield run
        return
    estimates = dict(zip(SAVED_ACTIVATIONS, candidate.memory, strict=True))
    for remat in policies:
        if remat == policies[-1] or estimates.get(remat, 0) <= MAX_OVERESTIMATE * available:
            yield dataclasses.replace(run, train=dataclasses.replace(run.train, remat=remat))


def _recomputed_flops(run: Run) -> int:
    return flops(run, run.train.clips_per_step)["recomputed"] if isinstance(run, TrainPlan) else 0


def _estimate(run: Run, mesh: MeshConfig) -> Candidate:
    """Estimate the memory and the communication of a run on a mesh.

    Layers exchange activations along `sequence` and sum them along `tensor`: in the forward pass, and when training
    also in the recomputation and in the backward pass. Training gathers the weights twice, because the recomputation
    shares a gather with the backward pass.
    """
    model = run.model
    width = 2 if model.dtype == "bfloat16" else 4
    kernels = model.layers * (8 * model.dim**2 + 2 * model.dim * model.ffn_dim)
    weights = (1 if model.quantize else width) * kernels / mesh.tensor
    shards = mesh.fsdp * mesh.sequence
    batch = run.train.batch_size if isinstance(run, TrainPlan) else mesh.data * mesh.fsdp
    tokens = batch / (mesh.data * mesh.fsdp) * programs.num_tokens(run) / mesh.sequence
    activation = width * tokens * model.dim
    if isinstance(run, TrainPlan):
        gathers, passes, saved = 2, 3, [per_block * model.layers for per_block in SAVED_ACTIVATIONS.values()]
    else:
        gathers, passes, saved = 1, 1, [0]
    ring = model.heads // mesh.tensor % mesh.sequence != 0
    exchanges = 2 * (mesh.sequence - 1) if ring else 4 * (1 - 1 / mesh.sequence)
    exchanged = model.layers * activation * (exchanges / mesh.tensor + 3 * 2 * (1 - 1 / mesh.tensor))
    sent = gathers * weights * (1 - 1 / shards) + passes * exchanged
    memory = tuple(round(weights / shards + activation * (count + WORKING_ACTIVATIONS)) for count in saved)
    return Candidate(mesh, round(weights / shards), memory, round(sent / batch))


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to write a number as an ordered product of `parts` factors."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    for sizes in itertools.product(divisors, repeat=parts - 1):
        if number % math.prod(sizes) == 0:
            yield (number // math.prod(sizes), *sizes)


def options(plan: Plan) -> list[str]:
    """Return the command-line options that give a program the mesh and the remat policy of a plan."""
    mesh = [f"--mesh.{axis}={size}" for axis, size in plan.mesh.items()]
    return mesh if plan.remat is None else [*mesh, f"--train.remat={plan.remat}"]


def _name(run: Run) -> str:
    mesh = " ".join(f"{axis}={getattr(run.mesh, axis)}" for axis in MESH_AXES)
    return f"{mesh} remat={run.train.remat}" if isinstance(run, TrainPlan) else mesh


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
