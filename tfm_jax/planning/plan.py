"""The memory, operations and traffic of a program on each device of a topology, as its compiler reports them."""

import re
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
from jax.sharding import Mesh

from tfm_jax.errors import CompilerError
from tfm_jax.planning import hlo, programs
from tfm_jax.planning.chips import GIB, Topology
from tfm_jax.planning.flops import sampling_flops, training_flops
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.sharding import make_mesh

SPLASH_PASSES = 3
"""Products as large as the scores that the TPU kernels of the backward pass make again; cuDNN and float32 make one."""

MARGIN = 0.05
"""Share of the memory that a plan should leave free. A run also holds batches that are read ahead and what the runtime
fragments; on GPUs the compiler cannot ask cuDNN for its workspace either."""

_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
"""The compiler's words for a program that does not fit: bytes needed and bytes there are."""


@dataclass(frozen=True)
class Plan:
    """One program on one mesh. Bytes are those of each device; where the program does not fit, some are not known."""

    program: str
    topology: str
    chips: int
    devices: int
    mesh: dict[str, int]
    remat: str | None
    clips: int
    tokens: int
    flops: dict[str, int]
    """Of the whole program, over all devices, by what they are for."""
    peak_flops: float
    """Of a device, a second."""
    arguments: int
    needed: int
    available: int
    compile_seconds: float
    cpu_seconds: float
    compiler_memory: int
    """Peak of this process on the machine that compiles."""
    temporaries: int | None = None
    code: int | None = None
    host: int | None = None
    """Bytes in the memory of the host, for each device."""
    collectives: dict[str, hlo.Traffic] | None = None
    uncounted_loops: int = 0

    @property
    def over(self) -> int:
        """Bytes too many; 0 or less where the program fits."""
        return self.needed - self.available

    @property
    def fits(self) -> bool:
        return self.over <= 0

    @property
    def tight(self) -> bool:
        """Whether it fits with so little memory to spare that a run may still fail."""
        return 0 <= -self.over < MARGIN * self.available

    @property
    def sent(self) -> int:
        """Bytes that a device sends."""
        return sum(traffic.bytes for traffic in (self.collectives or {}).values())

    @property
    def recomputed(self) -> int:
        """Operations that the remat policy repeats in the backward pass."""
        return self.flops.get("recomputed", 0)

    @property
    def seconds_of_arithmetic(self) -> float:
        """The least that the products take, evenly spread and at the peak rate: no step is faster."""
        return sum(self.flops.values()) / self.devices / self.peak_flops

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["collectives"] = {k: v._asdict() for k, v in self.collectives.items()} if self.collectives else None
        return {**values, "fits": self.fits, "over": self.over}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """What `as_json` gave."""
        own = {field.name: values[field.name] for field in fields(cls)}
        sent = own["collectives"]
        return cls(**{**own, "collectives": {k: hlo.Traffic(**v) for k, v in sent.items()} if sent else None})


def make_plan(run: TrainPlan | SamplePlan, topology: Topology) -> Plan:
    """Compile the training step, or a sampling step, for a topology.

    Raises:
        InputError: mesh, model, clip and batch do not go together.
        CompilerError: the compiler failed, and not for memory.
    """
    mesh = make_mesh(run.mesh, topology.devices)
    start, cpu = time.perf_counter(), _cpu_seconds()
    lowered, arguments = programs.lower(run, mesh)
    known = {**_facts(run, topology, mesh), "arguments": arguments}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = too_large(str(error))
        if sizes is None:
            raise CompilerError(f"the compiler failed: {' '.join(str(error).split())[:300]}") from error
        needed = max(sizes[0], sizes[1] + 1)  # the compiler rounds both, to the same number where little is lacking
        return Plan(**known, needed=needed, available=sizes[1], **_cost(start, cpu))
    cost = _cost(start, cpu)
    memory: Any = compiled.memory_analysis()
    sent = hlo.collectives(hlo.Module(compiled.as_text() or ""))
    lasting = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.peak_memory_in_bytes or lasting + memory.temp_size_in_bytes
    return Plan(
        **{**known, "arguments": memory.argument_size_in_bytes},
        needed=peak + memory.generated_code_size_in_bytes,
        available=topology.memory,
        temporaries=peak - lasting,
        code=memory.generated_code_size_in_bytes,
        host=memory.host_temp_size_in_bytes,
        collectives=sent.kinds,
        uncounted_loops=sent.uncounted_loops,
        **cost,
    )


def too_large(message: str) -> tuple[int, int] | None:
    """Bytes that a program needs and bytes that there are, where that is what the compiler complains of."""
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            needed, available = _bytes(found[1], found[2]), _bytes(found[3], found[4])
            return needed, available
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def _facts(run: TrainPlan | SamplePlan, topology: Topology, mesh: Mesh) -> dict[str, Any]:
    training = isinstance(run, TrainPlan)
    return {
        "program": "training step" if training else "sampling step",
        "topology": topology.name,
        "chips": topology.chips,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": run.train.remat if training else None,
        "clips": programs.clips(run, mesh),
        "tokens": programs.tokens(run),
        "flops": flops(run, topology, programs.clips(run, mesh)),
        "peak_flops": topology.chip.peak,
    }


def flops(run: TrainPlan | SamplePlan, topology: Topology, clips: int) -> dict[str, int]:
    """Operations of one call of a program by what they are for, over all devices."""
    config, tokens = programs.network(run.model), programs.tokens(run)
    if isinstance(run, SamplePlan):
        return {"forward": sampling_flops(config, clips, tokens, run.sampling.guidance != 1)}
    passes = 1 if topology.chip.target or run.model.dtype == "float32" else SPLASH_PASSES
    return training_flops(config, run.lora, run.train.remat, clips, tokens, score_passes=passes)._asdict()


def _cost(start: float, cpu: float) -> dict[str, Any]:
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux
    return {
        "compile_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(_cpu_seconds() - cpu, 1),
        "compiler_memory": peak,
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def describe(plan: Plan) -> str:
    """A plan in words, several lines."""
    device = "chip" if plan.devices == plan.chips else "device"
    chips = f"{plan.chips} chip{'s' * (plan.chips > 1)}" + (f", {plan.devices} devices" if device == "device" else "")
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items())
    remat = f", remat={plan.remat}" if plan.remat else ""
    lines = [
        f"{plan.program} on {plan.topology} ({chips}): compiled, not run",
        f"  mesh      {mesh}{remat}; {plan.clips} clips of {plan.tokens:,} tokens",
        f"  memory    {_memory(plan)} a {device}",
        f"            {_verdict(plan)}",
        f"  FLOPs     {_describe_flops(plan)}",
        f"            {plan.seconds_of_arithmetic:.3g} s of arithmetic at the peak rate, a lower bound for a step",
        f"  sent      {_sent(plan, device)}",
        f"  compiled  in {plan.compile_seconds:.0f} s, {plan.cpu_seconds:.0f} s of CPU, "
        f"with {plan.compiler_memory / 1e9:.1f} GB",
    ]
    return "\n".join(lines)


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _memory(plan: Plan) -> str:
    parts = [f"arguments {gib(plan.arguments)}"]
    if plan.temporaries is not None and plan.code is not None:
        parts += [f"temporaries {gib(plan.temporaries)}", f"code {gib(plan.code)}"]
    if plan.host:
        parts.append(f"in the host's memory {gib(plan.host)}")
    return f"{', '.join(parts)}; needs {gib(plan.needed)} of {gib(plan.available)}"


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
        f"{model:.4g} a step (forward {flops['forward']:.4g}, backward {flops['backward']:.4g}); "
        f"recomputed: {flops['recomputed']:.4g} by remat, {flops['scores']:.4g} for attention scores"
    )


def _sent(plan: Plan, device: str) -> str:
    if plan.collectives is None:
        return "not known"
    parts = [f"{kind} {gib(traffic.bytes)} ({traffic.times})" for kind, traffic in plan.collectives.items()]
    loops = f"; {plan.uncounted_loops} loops of unknown length counted once" if plan.uncounted_loops else ""
    return f"{gib(plan.sent)} by a {device}: {', '.join(parts) or 'nothing'}{loops}"
