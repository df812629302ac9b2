"""The roofline of a compiled program: a lower bound of its time on a chip that is not here.

An operation takes at least as long as its matrix products at the chip's peak, as its bytes at the bandwidth of its main
memory, and as what it sends at the bandwidth of its links. The bound of a program is the sum over its operations of the
largest of the three. Of a transfer that runs in the background, only the part counts that exceeds the bounds of the
operations before the program waits for it; the rest is hidden. A program takes longer than its bound: nothing here was
run.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tfm_jax.planning.chips import Chip
from tfm_jax.planning.hlo import Module
from tfm_jax.planning.operations import Operation, list_operations
from tfm_jax.wan.attention.dispatch import KERNEL_SCOPE
from tfm_jax.wan.layers import LORA_SCOPE

CLASSES = ("linear layers", "attention", "LoRA", "elementwise", "copies and layout", "collectives")
LARGEST = 10
"""Number of the largest operations that a roofline lists."""

_STRUCTURE = re.compile(r"while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|branch_\d+_fun|.*\(.*")
"""Parts of a scope that say nothing about the model."""


@dataclass(frozen=True)
class Row:
    """One operation or several, on one device in one execution of the program."""

    name: str
    runs: int
    flops: int
    bytes: int
    sent: int
    bound: float
    """Seconds that count in the bound of the program."""
    hidden: float
    """Seconds of the bounds of transfers that run behind other operations, and do not count."""
    cycles: int
    """The compiler's estimate of the clock cycles; 0 without an estimate."""


@dataclass(frozen=True)
class Roofline:
    """The bound of a program, and where it comes from."""

    bound: float
    """Seconds."""
    classes: list[Row]
    """One row for each of `CLASSES`."""
    largest: list[Row]
    """The single operations with the largest bounds."""
    collectives: list[Row]
    """The collectives by kind and origin."""
    unknown: list[str]
    """Names of the kernels whose matrix products are not counted."""
    bandwidth: float
    """Bytes per second of the chip's memory, per device."""
    interconnect: float
    """Bytes per second that a device can send."""

    @property
    def flops(self) -> int:
        """Operations of the matrix products on one device, as far as they are known."""
        return sum(row.flops for row in self.classes)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Roofline":
        rows = {name: [Row(**row) for row in values[name]] for name in ("classes", "largest", "collectives")}
        return cls(**{**values, **rows})


def make_roofline(module: Module, chip: Chip) -> Roofline:
    """Return the roofline of a compiled program on a chip."""
    schedule = list_operations(module)
    seconds = _Seconds(schedule, chip)
    operations = [x for computation in schedule.values() for x in computation if not x.calls]
    rows = [(x, _row(x, seconds)) for x in operations if x.flops or x.bytes or x.sent or x.unknown]
    bound = math.fsum(row.bound for _, row in rows)
    classes = {name: _sum(name, [row for x, row in rows if classify(x) == name]) for name in CLASSES}
    by_origin: dict[str, list[Row]] = {}
    for operation, row in rows:
        if operation.collective:
            by_origin.setdefault(f"{operation.collective}: {origin(operation.scope)}", []).append(row)
    return Roofline(
        bound,
        [*classes.values()],
        sorted((row for _, row in rows), key=lambda row: -row.bound)[:LARGEST],
        sorted((_sum(*item) for item in by_origin.items()), key=lambda row: -(row.bound + row.hidden)),
        sorted(x.name for x, _ in rows if x.unknown),
        chip.bandwidth,
        chip.interconnect,
    )


class _Seconds:
    """The bounds of operations, and of everything that runs between a start and its end."""

    def __init__(self, schedule: Mapping[str, list[Operation]], chip: Chip):
        self.chip = chip
        self.by_name = {computation: {x.name: x for x in schedule[computation]} for computation in schedule}

    def alone(self, operation: Operation) -> float:
        """Return the bound of one run of an operation, hidden or not."""
        chip = self.chip
        times = (operation.flops / chip.peak, operation.bytes / chip.bandwidth, operation.sent / chip.interconnect)
        return max(times)

    def hidden(self, operation: Operation) -> float:
        """Return the part of the bound of one run that other operations hide."""
        if operation.between is None:
            return 0.0
        own = self.by_name[operation.computation]
        behind = math.fsum(self._work(own[name]) for name in operation.between if name in own)
        return min(self.alone(operation), behind)

    def _work(self, operation: Operation) -> float:
        """Return the bound of one run of an operation that is not a transfer in the background, or of a loop."""
        if operation.between is not None:
            return 0.0
        inner = sum(runs * sum(map(self._work, self.by_name[name].values())) for name, runs in operation.calls)
        return self.alone(operation) + inner


def classify(operation: Operation) -> str:
    """Return the class of an operation. Scopes of the model decide what matrix products belong to."""
    if operation.collective:
        return "collectives"
    if operation.kernel or (operation.flops and _in(KERNEL_SCOPE, operation)):
        return "attention"
    if operation.flops:
        return "LoRA" if _in(LORA_SCOPE, operation) else "linear layers"
    return "copies and layout" if operation.moves else "elementwise"


def origin(scope: str) -> str:
    """Shorten the scope of an operation to the parts of the model, its kind, and the pass of the network."""
    parts = [part for part in scope.split("/") if part and not _STRUCTURE.fullmatch(part)]
    unique = [part for place, part in enumerate(parts) if part not in parts[:place]]
    backward = "recomputed" if "rematted_computation" in scope else "backward" if "transpose(" in scope else ""
    return " ".join(filter(None, ("/".join(unique), backward))) or "no scope"


def _in(name: str, operation: Operation) -> bool:
    return bool(re.search(rf"\b{name}\b", operation.scope))


def _row(operation: Operation, seconds: _Seconds) -> Row:
    times, hidden = operation.times, seconds.hidden(operation)
    shape = re.sub(r"\{[^}]*\}", "", operation.shape)
    shape = shape if len(shape) < 40 else shape[:36] + " ..."
    return Row(
        f"{origin(operation.scope)} {shape}",
        times,
        times * operation.flops,
        times * operation.bytes,
        round(times * operation.sent),
        times * (seconds.alone(operation) - hidden),
        times * hidden,
        times * operation.cycles,
    )


def _sum(name: str, rows: Iterable[Row]) -> Row:
    rows = list(rows)
    return Row(
        name,
        sum(row.runs for row in rows),
        sum(row.flops for row in rows),
        sum(row.bytes for row in rows),
        sum(row.sent for row in rows),
        math.fsum(row.bound for row in rows),
        math.fsum(row.hidden for row in rows),
        sum(row.cycles for row in rows),
    )
