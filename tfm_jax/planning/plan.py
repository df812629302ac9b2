"""Find the memory, operations, traffic and roofline of a program by compiling it for a topology, without running it."""

import functools
import re
import resource
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from tfm_jax.errors import CompilerError
from tfm_jax.flops import sampling_flops, training_flops, video_flops
from tfm_jax.planning import hlo, programs
from tfm_jax.planning.chips import GIB, Chip, Topology
from tfm_jax.planning.programs import Program, SamplePlan, TrainPlan
from tfm_jax.planning.roofline import Roofline, make_roofline
from tfm_jax.sharding import make_mesh

MARGIN = 0.05
"""Fraction of the memory that a plan should leave free, because a run also holds prefetched batches and loses memory to
fragmentation. On GPUs, the compiler's numbers also lack the workspace of cuDNN."""

_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
"""Match the compiler's messages about a program that does not fit: the memory needed, then the memory available."""


class Phase(NamedTuple):
    """A phase of a sampling run, in which one program runs. Sizes are in bytes per device."""

    weights: int
    """Size of the networks in memory: that of the program, and those that stay there for another phase."""
    rest: int
    """What else the program needs."""

    @property
    def needed(self) -> int:
        return self.weights + self.rest


@dataclass(frozen=True)
class Plan:
    """A program compiled for a mesh. Sizes are in bytes per device.

    The plan of a sampling run describes one step, but `needed` and `phases` are those of the whole run.

    The fields whose default is None stay None if the compiler rejects the program because it does not fit.
    """

    program: str
    topology: str
    chips: int
    devices: int
    mesh: dict[str, int]
    remat: str | None
    clips: int
    tokens: int
    """Number of video tokens per clip."""
    flops: dict[str, int]
    """Purpose -> floating-point operations of one call of the program, summed over all devices."""
    peak_flops: float
    """Peak floating-point operations per second of one device."""
    arguments: int
    """Size of the program's arguments."""
    needed: int
    """Memory that the program needs."""
    available: int
    """Memory that programs can use."""
    compile_seconds: float
    cpu_seconds: float
    compiler_memory: int
    """Peak resident memory of the process that compiled the program, in bytes."""
    temporaries: int | None = None
    code: int | None = None
    host: int | None = None
    """Size of the activations that are offloaded to the host's memory."""
    collectives: dict[str, hlo.Traffic] | None = None
    uncounted_loops: int = 0
    """See `hlo.Collectives.uncounted_loops`."""
    roofline: Roofline | None = None
    networks: dict[str, int] | None = None
    """Name of each network of a sampling run -> size of its weights."""
    phases: dict[str, Phase] | None = None
    """The phases of a sampling run, by name."""
    steps: int | None = None
    """Number of steps of a sampling run."""
    flops_per_video: int | None = None
    """Operations of all steps of a video."""

    @property
    def over(self) -> int:
        """Bytes needed beyond the available memory; negative if the program leaves some free."""
        return self.needed - self.available

    @property
    def fits(self) -> bool:
        return self.over <= 0

    @property
    def tight(self) -> bool:
        """Whether the program fits but leaves less than `MARGIN` free, so that a run may still fail."""
        return 0 <= -self.over < MARGIN * self.available

    @property
    def bytes_sent(self) -> int:
        """Bytes that each device sends in one call of the program; 0 if unknown."""
        return sum(traffic.bytes for traffic in (self.collectives or {}).values())

    @property
    def recomputed_flops(self) -> int:
        """Operations that the remat policy repeats in the backward pass, over all devices."""
        return self.flops.get("recomputed", 0)

    @property
    def seconds_at_peak(self) -> float:
        """Lower bound for the time of one call: the operations spread evenly over the devices, at the peak rate."""
        return sum(self.flops.values()) / self.devices / self.peak_flops

    @property
    def best_utilisation(self) -> float:
        """Upper bound for the model FLOPs utilisation: the operations of the model that a step needs without repeating
        any, as a fraction of those that the devices can do within the bound of the roofline; 0 if unknown."""
        needed = self.flops["forward"] + self.flops.get("backward", 0)
        return needed / self.devices / self.peak_flops / self.roofline.bound if self.roofline else 0.0

    @property
    def seconds_per_video(self) -> float | None:
        """Like `seconds_at_peak`, for all steps of a video; None for training."""
        return None if self.flops_per_video is None else self.flops_per_video / self.devices / self.peak_flops

    def as_json(self) -> dict[str, Any]:
        """Return the plan as a value that `json` can write."""
        values = asdict(self)
        for name in _TUPLES:
            tuples = getattr(self, name)
            values[name] = {k: v._asdict() for k, v in tuples.items()} if tuples else None
        return {**values, "fits": self.fits, "over": self.over}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """Return the plan from the value that `as_json` returned.

        Raises:
            KeyError: a field without a default is missing.
        """
        names = [field.name for field in fields(cls) if field.default is MISSING or field.name in values]
        own = {name: values[name] for name in names}
        for name, kind in _TUPLES.items():
            if own.get(name):
                own[name] = {k: kind(**v) for k, v in own[name].items()}
        if own.get("roofline"):
            own["roofline"] = Roofline.from_json(own["roofline"])
        return cls(**own)


_TUPLES = {"collectives": hlo.Traffic, "phases": Phase}
"""The fields of a plan that hold named tuples, and the type of these."""


def make_plan(run: TrainPlan | SamplePlan, topology: Topology) -> Plan:
    """Compile the training step, or the programs of a sampling run, for a topology.

    Raises:
        InputError: the mesh cannot split the model, the clip, the batch or a parameter.
        CompilerError: the compiler failed for a reason other than memory.
    """
    mesh = make_mesh(run.mesh, topology.devices)
    start, cpu = time.perf_counter(), _cpu_seconds()
    program = programs.lower(run, mesh)
    found = {**_static_fields(run, topology, mesh), "arguments": program.arguments, "available": topology.memory}
    compiled, found["needed"] = _compile(program)
    if compiled:
        found |= _compiled_fields(compiled, topology.chip)
    if isinstance(run, SamplePlan):
        found |= _sampling_fields(run, mesh, program, found["needed"])
    return Plan(**found, **_compile_cost(start, cpu))


def _compile(program: Program) -> tuple[jax.stages.Compiled | None, int]:
    """Compile a program, and return the memory that it needs; None for a program that is rejected because it does not
    fit."""
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = out_of_memory_sizes(str(error))
        if sizes is None:
            raise CompilerError(f"the compiler failed: {' '.join(str(error).split())[:300]}") from error
        return None, max(sizes[0], sizes[1] + 1)  # the message rounds both sizes, which can make them equal
    memory: Any = compiled.memory_analysis()
    return compiled, _peak(memory) + memory.generated_code_size_in_bytes


def _peak(memory: Any) -> int:
    return memory.peak_memory_in_bytes or _arguments_and_outputs(memory) + memory.temp_size_in_bytes


def _arguments_and_outputs(memory: Any) -> int:
    return memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _compiled_fields(compiled: jax.stages.Compiled, chip: Chip) -> dict[str, Any]:
    """Return the fields of a plan that only the compiled program tells."""
    memory: Any = compiled.memory_analysis()
    module = hlo.Module(compiled.as_text() or "")
    traffic = hlo.collectives(module)
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": _peak(memory) - _arguments_and_outputs(memory),
        "code": memory.generated_code_size_in_bytes,
        "host": memory.host_temp_size_in_bytes,
        "collectives": traffic.kinds,
        "uncounted_loops": traffic.uncounted_loops,
        "roofline": make_roofline(module, chip),
    }


def _sampling_fields(run: SamplePlan, mesh: Mesh, denoising: Program, needed: int) -> dict[str, Any]:
    """Return the fields of the plan of a whole sampling run. The autoencoder stays in memory in all phases, and the
    transformer from denoising on; the text encoder is freed before.

    Args:
        needed: memory that the denoising step needs.
    """
    encoding = programs.prompt_encoding(run, mesh)
    vae, decoding = _memory_of_decoding(run.model.path, programs.decoded_size(run), mesh.devices.flat[0])
    networks = {"transformer": denoising.weights, "text encoder": encoding.weights, "autoencoder": vae}
    phases = {
        "encoding": Phase(encoding.weights + vae, _compile(encoding)[1] - encoding.weights),
        "denoising": Phase(denoising.weights + vae, needed - denoising.weights),
        "decoding": Phase(denoising.weights + vae, decoding),
    }
    return {
        "networks": networks,
        "phases": phases,
        "needed": max(phase.needed for phase in phases.values()),
        "steps": run.sampling.steps,
        "flops_per_video": video_flops(programs.transformer_config(run.model), run.sampling, programs.num_tokens(run)),
    }


@functools.cache
def _memory_of_decoding(path: Path, size: tuple[int, int, int], device: Any) -> tuple[int, int]:
    """Return the size of the autoencoder, and what else decoding needs. A search asks for this again and again, and the
    program takes minutes to compile for TPUs."""
    program = programs.decoding(path, size, device)
    return program.weights, _compile(program)[1] - program.weights


def out_of_memory_sizes(message: str) -> tuple[int, int] | None:
    """Return the bytes needed and the bytes available from a compiler error; None if it is not about device memory."""
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            return _parse_bytes(found[1], found[2]), _parse_bytes(found[3], found[4])
    return None


def _parse_bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def _static_fields(run: TrainPlan | SamplePlan, topology: Topology, mesh: Mesh) -> dict[str, Any]:
    """Return the fields of a plan that are known without compiling."""
    clips = programs.num_clips(run, mesh)
    training = isinstance(run, TrainPlan)
    return {
        "program": "training step" if training else "sampling step",
        "topology": topology.name,
        "chips": topology.chips,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": run.train.remat if training else None,
        "clips": clips,
        "tokens": programs.num_tokens(run),
        "flops": flops(run, clips),
        "peak_flops": topology.chip.peak,
    }


def flops(run: TrainPlan | SamplePlan, clips: int) -> dict[str, int]:
    """Map each purpose to the floating-point operations of one call of a program, summed over all devices."""
    config, tokens = programs.transformer_config(run.model), programs.num_tokens(run)
    if isinstance(run, SamplePlan):
        return {"forward": sampling_flops(config, clips, tokens, run.sampling.guidance != 1)}
    return training_flops(config, run.lora, run.train.remat, clips, tokens)._asdict()


def _compile_cost(start: float, cpu: float) -> dict[str, Any]:
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux reports KiB
    return {
        "compile_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(_cpu_seconds() - cpu, 1),
        "compiler_memory": peak,
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def describe(plan: Plan) -> str:
    """Describe a plan in a few human-readable lines."""
    device = "chip" if plan.devices == plan.chips else "device"
    chips = f"{plan.chips} chip{'s' * (plan.chips > 1)}" + (f", {plan.devices} devices" if device == "device" else "")
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items())
    remat = f", remat={plan.remat}" if plan.remat else ""
    lines = [
        f"{plan.program} on {plan.topology} ({chips}): compiled, not run",
        f"  mesh      {mesh}{remat}; {plan.clips} clip{'s' * (plan.clips > 1)} of {plan.tokens:,} tokens",
        f"  memory    {_memory(plan)} per {device}",
        *_describe_phases(plan),
        f"            {_verdict(plan)}",
        f"  FLOPs     {_describe_flops(plan)}",
        f"            {plan.seconds_at_peak:.3g} s at the peak rate, a lower bound for the time of a step",
        *_describe_video(plan),
        f"  sent      {_sent(plan, device)}",
        f"  compiled  in {plan.compile_seconds:.0f} s, {plan.cpu_seconds:.0f} s of CPU, "
        f"with {plan.compiler_memory / 1e9:.1f} GB",
    ]
    return "\n".join(lines)


def _describe_phases(plan: Plan) -> list[str]:
    if not plan.networks or not plan.phases:
        return []
    networks = ", ".join(f"{name} {gib(size)}" for name, size in plan.networks.items())
    phases = ", ".join(f"{name} {gib(phase.needed)}" for name, phase in plan.phases.items())
    return [f"  weights   {networks}", f"  phases    {phases}, with all weights in memory"]


def _describe_video(plan: Plan) -> list[str]:
    if plan.flops_per_video is None:
        return []
    bound = f"{plan.seconds_per_video:.3g} s at the peak rate, a lower bound for the time of a video"
    return [f"            {plan.flops_per_video:.4g} per video of {plan.steps} steps: {bound}"]


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _memory(plan: Plan) -> str:
    parts = [f"arguments {gib(plan.arguments)}"]
    if plan.temporaries is not None and plan.code is not None:
        parts += [f"temporaries {gib(plan.temporaries)}", f"code {gib(plan.code)}"]
    if plan.host:
        parts.append(f"offloaded to host memory {gib(plan.host)}")
    whose = "the run" if plan.phases else "it"
    return f"{', '.join(parts)}; {whose} needs {gib(plan.needed)} of {gib(plan.available)}"


def _verdict(plan: Plan) -> str:
    if plan.tight:
        return f"fits, with only {gib(-plan.over)} to spare: a run may still run out of memory"
    if plan.fits:
        return f"fits, {gib(-plan.over)} to spare"
    return f"DOES NOT FIT: {plan.over:,} bytes ({gib(plan.over)}) over"


def _describe_flops(plan: Plan) -> str:
    flops = plan.flops
    if "backward" not in flops:
        return f"{flops['forward']:.4g}"
    model = flops["forward"] + flops["backward"]
    return (
        f"{model:.4g} per step (forward {flops['forward']:.4g}, backward {flops['backward']:.4g}); "
        f"recomputed: {flops['recomputed']:.4g} by remat, {flops['scores']:.4g} by attention"
    )


def _sent(plan: Plan, device: str) -> str:
    if plan.collectives is None:
        return "unknown"
    parts = [f"{kind} {gib(traffic.bytes)} ({traffic.times})" for kind, traffic in plan.collectives.items()]
    uncounted = (
        f"; {plan.uncounted_loops} collectives are in loops of unknown trip count and count once"
        if plan.uncounted_loops
        else ""
    )
    return f"{gib(plan.bytes_sent)} per {device}: {', '.join(parts) or 'nothing'}{uncounted}"
