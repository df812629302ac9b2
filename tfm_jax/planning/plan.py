"""Find the memory, operations, traffic and roofline of a program by compiling it for a topology, without running it."""

import re
import resource
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import jax
from jax.sharding import Mesh

from tfm_jax.errors import CompilerError
from tfm_jax.flops import sampling_flops, training_flops
from tfm_jax.planning import hlo, programs
from tfm_jax.planning.chips import GIB, Topology
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.planning.roofline import Roofline, make_roofline
from tfm_jax.sharding import make_mesh

SPLASH_SCORE_PRODUCTS = 3
"""How many matrix products with the size of the attention scores splash attention (bfloat16 on TPUs) recomputes in its
backward pass. Other attention kernels recompute one."""

MARGIN = 0.05
"""Fraction of the memory that a plan should leave free, because a run also holds prefetched batches and loses memory to
fragmentation. On GPUs, the compiler's numbers also lack the workspace of cuDNN."""

_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
"""Match the compiler's messages about a program that does not fit: the memory needed, then the memory available."""


@dataclass(frozen=True)
class Plan:
    """A program compiled for a mesh. Sizes are in bytes per device.

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

    def as_json(self) -> dict[str, Any]:
        """Return the plan as a value that `json` can write."""
        values = asdict(self)
        values["collectives"] = {k: v._asdict() for k, v in self.collectives.items()} if self.collectives else None
        return {**values, "fits": self.fits, "over": self.over}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """Return the plan from the value that `as_json` returned.

        Raises:
            KeyError: a field without a default is missing.
        """
        names = [field.name for field in fields(cls) if field.default is MISSING or field.name in values]
        own = {name: values[name] for name in names}
        if traffic := own.get("collectives"):
            own["collectives"] = {k: hlo.Traffic(**v) for k, v in traffic.items()}
        if roofline := own.get("roofline"):
            own["roofline"] = Roofline.from_json(roofline)
        return cls(**own)


def make_plan(run: TrainPlan | SamplePlan, topology: Topology) -> Plan:
    """Compile the training step, or a sampling step, for a topology.

    Raises:
        InputError: the mesh cannot split the model, the clip, the batch or a parameter.
        CompilerError: the compiler failed for a reason other than memory.
    """
    mesh = make_mesh(run.mesh, topology.devices)
    start, cpu = time.perf_counter(), _cpu_seconds()
    lowered, arguments = programs.lower(run, mesh)
    static = {**_static_fields(run, topology, mesh), "arguments": arguments}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = out_of_memory_sizes(str(error))
        if sizes is None:
            raise CompilerError(f"the compiler failed: {' '.join(str(error).split())[:300]}") from error
        needed = max(sizes[0], sizes[1] + 1)  # the message rounds both sizes, which can make them equal
        return Plan(**static, needed=needed, available=sizes[1], **_compile_cost(start, cpu))
    cost = _compile_cost(start, cpu)
    memory: Any = compiled.memory_analysis()
    module = hlo.Module(compiled.as_text() or "")
    traffic = hlo.collectives(module)
    arguments_and_outputs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.peak_memory_in_bytes or arguments_and_outputs + memory.temp_size_in_bytes
    return Plan(
        **{**static, "arguments": memory.argument_size_in_bytes},
        needed=peak + memory.generated_code_size_in_bytes,
        available=topology.memory,
        temporaries=peak - arguments_and_outputs,
        code=memory.generated_code_size_in_bytes,
        host=memory.host_temp_size_in_bytes,
        collectives=traffic.kinds,
        uncounted_loops=traffic.uncounted_loops,
        roofline=make_roofline(module, topology.chip),
        **cost,
    )


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
        "flops": flops(run, topology, clips),
        "peak_flops": topology.chip.peak,
    }


def flops(run: TrainPlan | SamplePlan, topology: Topology, clips: int) -> dict[str, int]:
    """Map each purpose to the floating-point operations of one call of a program, summed over all devices."""
    config, tokens = programs.transformer_config(run.model), programs.num_tokens(run)
    if isinstance(run, SamplePlan):
        return {"forward": sampling_flops(config, clips, tokens, run.sampling.guidance != 1)}
    products = 1 if topology.chip.target or run.model.dtype == "float32" else SPLASH_SCORE_PRODUCTS
    return training_flops(config, run.lora, run.train.remat, clips, tokens, score_products=products)._asdict()


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
        f"  mesh      {mesh}{remat}; {plan.clips} clips of {plan.tokens:,} tokens",
        f"  memory    {_memory(plan)} per {device}",
        f"            {_verdict(plan)}",
        f"  FLOPs     {_describe_flops(plan)}",
        f"            {plan.seconds_at_peak:.3g} s at the peak rate, a lower bound for the time of a step",
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
        parts.append(f"offloaded to host memory {gib(plan.host)}")
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
