"""What a compiled program says of itself in text: how often each part of it runs, and what it sends between devices.

`compiled.as_text()` is HLO: computations of one instruction a line. A loop names its body and its condition; how often
it turns is read from the compiler's own note, or else from the counter that the condition compares.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMED = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_LISTED = re.compile(r"(?:calls|branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")

_BITS = {"pred": 8, "bf16": 16}
"""Types that do not end in their number of bits, before what follows it (f8e4m3fn)."""

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    """Attributes, as they are written."""


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    root: str


class Traffic(NamedTuple):
    """Collectives of one kind in one run of a program."""

    times: int
    bytes: int
    """That one device sends, with the algorithms that send least (rings)."""


class Collectives(NamedTuple):
    kinds: dict[str, Traffic]
    uncounted_loops: int
    """Loops with collectives in them whose length could not be read: counted as if they turned once."""


class Module:
    """A compiled program. `times` says how often each of its computations runs."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        devices = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self.devices = int(devices[1]) if devices else 1
        self._read(text)
        self.unread_loops: set[str] = set()
        self.times: Counter[str] = Counter()
        self._run(self.entry, 1)

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """All of them, each with the computation that it is in."""
        for name, computation in self.computations.items():
            for instruction in computation.instructions.values():
                yield name, instruction

    def _read(self, text: str) -> None:
        instructions: dict[str, Instruction] = {}
        name = root = ""
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                name, instructions, root = header[2], {}, ""
                self.entry = name if header[1] else self.entry
            elif line.startswith("}"):  # behind it may stand which kind of core runs it
                self.computations[name] = Computation(instructions, root)
            elif named := _NAMED.match(line):
                instructions[named[2]] = _instruction(named[2], line[named.end() :])
                root = named[2] if named[1] else root

    def _run(self, name: str, times: int) -> None:
        self.times[name] += times
        for instruction in self.computations[name].instructions.values():
            if loop := _LOOP.search(instruction.rest):
                trips = self._trips(name, instruction, *loop.groups())
                if trips is None:
                    self.unread_loops.add(loop[2])
                self._run(loop[1], times * ((trips or 1) + 1))
                self._run(loop[2], times * (1 if trips is None else trips))
            elif not instruction.op.endswith(("-done", "-update")):
                for called in _called(instruction):
                    self._run(called, times)

    def _trips(self, name: str, loop: Instruction, condition: str, body: str) -> int | None:
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        compared = self._compared(condition)
        if compared is None:
            return None
        index, limit = compared
        before = self._element(name, loop.operands[0], index, {})
        after = self._element(body, self.computations[body].root, index, {})
        if not isinstance(before, int) or not isinstance(after, _Counter) or after.element != index or after.added <= 0:
            return None
        return max(0, -(-(limit - before) // after.added))

    def _compared(self, condition: str) -> "tuple[int, int] | None":
        """Which element of the loop's tuple must stay below which number."""
        computation, bound = self.computations[condition], dict[int, _Scalar]()
        instruction = computation.instructions[computation.root]
        if instruction.op == "fusion":
            bound = self._bound(condition, instruction, bound)
            condition = _called(instruction)[0]
            computation = self.computations[condition]
            instruction = computation.instructions[computation.root]
        if instruction.op != "compare" or not re.search(r"direction=(LT|NE)\b", instruction.rest):
            return None
        left, right = (self._scalar(condition, operand, bound) for operand in instruction.operands)
        return (
            (left.element, right) if isinstance(left, _Counter) and left.added == 0 and isinstance(right, int) else None
        )

    def _bound(self, name: str, fusion: Instruction, bound: "Mapping[int, _Scalar]") -> "dict[int, _Scalar]":
        return {place: self._scalar(name, operand, bound) for place, operand in enumerate(fusion.operands)}

    def _element(self, name: str, of: str, index: int, bound: "Mapping[int, _Scalar]") -> "_Scalar":
        """One element of a tuple."""
        instruction = self.computations[name].instructions[of]
        if instruction.op == "tuple":
            return self._scalar(name, instruction.operands[index], bound)
        if instruction.op == "parameter":
            return _Counter(index, 0)
        if instruction.op == "fusion":
            called = _called(instruction)[0]
            return self._element(called, self.computations[called].root, index, self._bound(name, instruction, bound))
        if instruction.op in ("copy", "optimization-barrier"):
            return self._element(name, instruction.operands[0], index, bound)
        return None

    def _scalar(self, name: str, of: str, bound: "Mapping[int, _Scalar]") -> "_Scalar":
        """A scalar as a number, or as an element of the loop's tuple plus a number; None where it is neither."""
        instruction = self.computations[name].instructions[of]
        operands = instruction.operands
        if not re.match(r"[su]\d+\[\]", instruction.shape):
            return None
        match instruction.op:
            case "constant":
                return int(operands[0])
            case "parameter":
                return bound.get(int(operands[0]))
            case "get-tuple-element":
                return self._element(name, operands[0], int(_attribute("index", instruction)), bound)
            case "copy" | "bitcast" | "convert" | "copy-done":
                return self._scalar(name, operands[0], bound)
            case "copy-start":
                return self._scalar(name, operands[0], bound)
            case "add":
                return _sum(*(self._scalar(name, operand, bound) for operand in operands))
            case "fusion":
                called = _called(instruction)[0]
                return self._scalar(called, self.computations[called].root, self._bound(name, instruction, bound))
        return None


class _Counter(NamedTuple):
    """An element of the tuple that a loop carries, plus `added`."""

    element: int
    added: int


_Scalar = int | _Counter | None


def _sum(left: _Scalar, right: _Scalar) -> _Scalar:
    match left, right:
        case (int(), int()):
            return left + right
        case (_Counter(element, added), int()):
            return _Counter(element, added + right)
        case (int(), _Counter(element, added)):
            return _Counter(element, added + left)
    return None


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    op, _, text = text.partition("(")
    end = _closing("(" + text) - 1
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(text[: end - 1]) if part.strip())
    return Instruction(name, shape, op, operands, text[end:])


def _closing(text: str) -> int:
    """Behind the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"HLO with an open parenthesis: {text[:200]}")


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _called(instruction: Instruction) -> list[str]:
    listed = [name.strip().lstrip("%") for names in _LISTED.findall(instruction.rest) for name in names.split(",")]
    return _CALLED.findall(instruction.rest) + [name for name in listed if name]


def _attribute(name: str, instruction: Instruction) -> str:
    found = re.search(rf"\b{name}=(\w+)", instruction.rest)
    if not found:
        raise ValueError(f"HLO without {name}=: {instruction.op}{instruction.rest[:200]}")
    return found[1]


def array_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape, such as `(f32[2,3]{1,0}, s8[4])`: 28."""
    return (
        sum(_bits(kind) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in _ARRAY.findall(shape))
        // 8
    )


def _bits(kind: str) -> int:
    number = re.search(r"\d+", kind.removeprefix("b"))
    return _BITS.get(kind) or (int(number[0]) if number else 0)


# Bytes sent by one device of a group of n, of a result of b bytes.
_SENT: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda b, n: b * (n - 1) / n,
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "reduce-scatter": lambda b, n: b * (n - 1),
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-permute": lambda b, n: b,
}


def collectives(module: Module) -> Collectives:
    """Collectives of one run of a program by kind, those in loops as often as the loops turn.

    A collective that is split into a start and a done counts once. TPU programs hold the collectives that run beside
    other work in several fusions each, of which one starts them; and a reduce-scatter as an all-reduce in a fusion of
    that name.
    """
    counts, sent = Counter(), Counter()
    unread = 0
    for name, instruction in module.instructions():
        kind = instruction.op.removesuffix("-start")
        if kind not in KINDS or not module.times[name] or _continues(instruction, module.computations[name]):
            continue
        size = array_bytes(_result(instruction))
        group = _group_size(instruction.rest, module.devices)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind, size = "reduce-scatter", size // group
        if group > 1:
            counts[kind] += module.times[name]
            sent[kind] += round(module.times[name] * _SENT[kind](size, group))
            unread += name in module.unread_loops
    return Collectives({kind: Traffic(counts[kind], sent[kind]) for kind in KINDS if counts[kind]}, unread)


def _continues(instruction: Instruction, computation: Computation) -> bool:
    """Whether this is one of the fusions that go on with a collective which another one started."""
    starts = any('custom_call_target="AsyncCollectiveStart"' in x.rest for x in computation.instructions.values())
    return "chain_id=" in instruction.rest and not starts


def _result(instruction: Instruction) -> str:
    """The shape of what a collective makes; that of a start may hold operands and tokens too."""
    if instruction.op in ("all-gather-start", "collective-permute-start") or instruction.shape.startswith("(("):
        return _split(instruction.shape[1:-1])[1]
    return instruction.shape


def _group_size(attributes: str, devices: int) -> int:
    """How many devices take part together; of a permutation, how many there are."""
    if "source_target_pairs=" in attributes:
        return devices
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    return devices
