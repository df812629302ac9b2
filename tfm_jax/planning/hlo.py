"""Read the text of a compiled program: how often each computation runs, and what the devices send to each other.

`compiled.as_text()` is HLO: computations with one instruction per line. A while loop names its body and its condition.
CPU and GPU programs annotate each loop with its trip count. TPU programs do not, and the length of a scan is not always
the trip count, because XLA may have unrolled the loop. For them, the trip count is computed from the loop's counter.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_CALLEE = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLEES = re.compile(r"(?:calls|branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")

_BITS = {"pred": 8}
"""Size in bits of the element types whose names do not contain it, unlike names such as bf16 and f8e4m3fn."""

COLLECTIVE_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    """The text after the operands, not parsed."""


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    """Name -> instruction, in the order in which they run."""
    root: str
    parameters: list[str]
    """Names of the parameters, in the order in which a caller passes them."""
    users: dict[str, list[Instruction]]
    """Name of an instruction -> the instructions that have it as an operand."""


class Traffic(NamedTuple):
    """The collectives of one kind in one execution of a program."""

    times: int
    """Number of collectives that run."""
    bytes: int
    """Bytes that one device sends with the algorithms that send the least, such as rings."""


class Collectives(NamedTuple):
    """The collectives in one execution of a program."""

    kinds: dict[str, Traffic]
    uncounted_loops: int
    """Number of collectives in loop bodies whose trip count could not be read; they count as if the loop ran once."""


class Module:
    """A compiled program.

    Attributes:
        computations: name -> computation.
        entry: name of the computation at which the program starts.
        devices: number of devices that the program runs on.
        times: name of a computation -> how often one execution of the program runs the computation.
        unread_loops: names of the loop bodies whose trip count could not be read; they count once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        devices = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self.devices = int(devices[1]) if devices else 1
        self._parse(text)
        self.unread_loops: set[str] = set()
        self.times: Counter[str] = Counter()
        self._count(self.entry, 1)

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """Yield each instruction, preceded by the name of its computation."""
        for name, computation in self.computations.items():
            for instruction in computation.instructions.values():
                yield name, instruction

    def _parse(self, text: str) -> None:
        instructions: dict[str, Instruction] = {}
        name = root = last = ""
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                name, instructions, root = header[2], {}, ""
                self.entry = name if header[1] else self.entry
            elif named := _INSTRUCTION.match(line):
                last = named[2]
                instructions[last] = _parse_instruction(last, _COMMENT.sub("", line[named.end() :]))
                root = last if named[1] else root
            elif line.startswith(("}}", '"')):  # the metadata of a Pallas kernel fills several lines
                instructions[last] = instructions[last]._replace(attributes=instructions[last].attributes + line)
            elif line.startswith("}"):  # the name of an execution thread may follow the brace
                self.computations[name] = _computation(instructions, root)

    def _count(self, name: str, times: int) -> None:
        """Add `times` runs of a computation and of the computations that it calls."""
        self.times[name] += times
        for instruction in self.computations[name].instructions.values():
            for computation, runs in self.calls(name, instruction):
                self._count(computation, times * runs)

    def calls(self, name: str, instruction: Instruction) -> list[tuple[str, int]]:
        """Return the computations that an instruction of the computation `name` calls, and how often each runs."""
        if loop := _LOOP.search(instruction.attributes):
            trips = self._trip_count(name, instruction, *loop.groups())
            if trips is None:
                self.unread_loops.add(loop[2])
                trips = 1
            return [(loop[1], trips + 1), (loop[2], trips)]
        return [] if instruction.op.endswith(("-done", "-update")) else [(name, 1) for name in called(instruction)]

    def _trip_count(self, name: str, loop: Instruction, condition: str, body: str) -> int | None:
        """Return how often the body of a loop runs, or None if the text does not show it."""
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        compare = self._source(condition, self.computations[condition].root)
        if compare.op != "compare" or not re.search(r"direction=(LT|NE)\b", compare.attributes):
            return None
        if (index := self._counter_index(condition, compare.operands[0])) is None:
            return None
        limit = self._integer(condition, compare.operands[1])
        start, step = self._start(name, loop, index), self._step(body, index)
        if limit is None or start is None or step is None or step <= 0:
            return None
        return max(0, -(-(limit - start) // step))

    def _source(self, name: str, operand: str) -> Instruction:
        """Return the instruction that computes an operand, looking through copies."""
        instructions = self.computations[name].instructions
        instruction = instructions[operand]
        while instruction.op == "copy":
            instruction = instructions[instruction.operands[0]]
        return instruction

    def _counter_index(self, name: str, operand: str) -> int | None:
        """Return the index of an operand in the loop's tuple, or None if the operand is not an element of the tuple."""
        instruction = self._source(name, operand)
        if instruction.op != "get-tuple-element" or self._source(name, instruction.operands[0]).op != "parameter":
            return None
        return int(_attribute("index", instruction))

    def _start(self, name: str, loop: Instruction, index: int) -> int | None:
        """Return the value of the counter before the loop, or None if the text does not show it."""
        values = self._source(name, loop.operands[0])
        return self._integer(name, values.operands[index]) if values.op == "tuple" else None

    def _step(self, body: str, index: int) -> int | None:
        """Return what one iteration adds to the counter, or None if the text does not show it."""
        values = self._source(body, self.computations[body].root)
        if values.op != "tuple":
            return None
        add = self._source(body, values.operands[index])
        if add.op != "add":
            return None
        steps = [
            self._integer(body, operand) for operand in add.operands if self._counter_index(body, operand) != index
        ]
        return steps[0] if len(steps) == 1 else None

    def _integer(self, name: str, operand: str) -> int | None:
        """Return the value of an operand that is a constant integer scalar, or None if it is not one."""
        instruction = self._source(name, operand)
        constant = instruction.op == "constant" and re.match(r"[su]\d+\[\]", instruction.shape)
        return int(instruction.operands[0]) if constant else None


def _computation(instructions: dict[str, Instruction], root: str) -> Computation:
    users: dict[str, list[Instruction]] = {name: [] for name in instructions}
    for instruction in instructions.values():
        for operand in dict.fromkeys(instruction.operands):
            if operand in users:  # a parameter has its number as its operand, and a constant its value
                users[operand].append(instruction)
    parameters = [x for x in instructions.values() if x.op == "parameter"]
    return Computation(
        instructions, root, [x.name for x in sorted(parameters, key=lambda x: int(x.operands[0]))], users
    )


def _parse_instruction(name: str, text: str) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    op, _, text = text.partition("(")
    end = _closing("(" + text) - 1
    operands = tuple(part.split()[-1].lstrip("%") for part in split(text[: end - 1]) if part.strip())
    return Instruction(name, shape, op, operands, text[end:])


def _closing(text: str) -> int:
    """Return the index just after the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"HLO with an unclosed parenthesis: {text[:200]}")


def split(text: str) -> list[str]:
    """Split a text at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def called(instruction: Instruction) -> list[str]:
    """Return the names of the computations that an instruction calls."""
    listed = [
        name.strip().lstrip("%") for names in _CALLEES.findall(instruction.attributes) for name in names.split(",")
    ]
    return _CALLEE.findall(instruction.attributes) + [name for name in listed if name]


def _attribute(name: str, instruction: Instruction) -> str:
    found = re.search(rf"\b{name}=(\w+)", instruction.attributes)
    if not found:
        raise ValueError(f"HLO without {name}=: {instruction.op}{instruction.attributes[:200]}")
    return found[1]


def array_bytes(shape: str) -> int:
    """Return the total size of the arrays in a shape, such as 28 for `(f32[2,3]{1,0}, s8[4])`."""
    return sum(_bits(dtype) * math.prod(sizes(dims)) for dtype, dims, _ in _ARRAY.findall(shape)) // 8


def buffer_bytes(shape: str, hbm_only: bool = False) -> int:
    """Return the bytes that the arrays of a shape occupy in memory, including the padding of their tiles.

    A layout such as `{1,0:T(8,128)(2,1)S(1)}` lists the axes from the fastest to the slowest, the tile to which the
    fastest axes are padded, and the memory. Main memory (HBM) is 0 or not listed.

    Args:
        hbm_only: leave out arrays that are in another memory, such as the VMEM of a TPU.
    """
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if not (hbm_only and re.search(r"S\([1-9]", layout)):
            total += _bits(dtype) * math.prod(_padded(sizes(dims), layout))
    return total // 8


def _padded(dims: list[int], layout: str) -> list[int]:
    """Return the sizes of an array's axes with the padding of its tiles."""
    order, _, tiling = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    for axis, step in zip(sizes(order), reversed(sizes(tile[1]) if tile else []), strict=False):
        dims[axis] = -(-dims[axis] // step) * step
    return dims


def arrays(shape: str) -> list[list[int]]:
    """Return the sizes of each array in a shape."""
    return [sizes(dims) for _, dims, _ in _ARRAY.findall(shape)]


def sizes(text: str) -> list[int]:
    """Return the integers in a text such as `8,128`."""
    return [int(size) for size in text.split(",") if size]


def _bits(dtype: str) -> int:
    """Return the size of an element in bits; 0 for types without data, such as `token`."""
    number = re.search(r"\d+", dtype)
    return _BITS.get(dtype) or (int(number[0]) if number else 0)


# The bytes that each device of a group of n sends, if the result of the collective has b bytes.
_SENT: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda b, n: b * (n - 1) / n,
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "reduce-scatter": lambda b, n: b * (n - 1),
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-permute": lambda b, n: b,
}


def collectives(module: Module) -> Collectives:
    """Count the collectives in one execution of a program by kind. A collective in a loop counts once per iteration.

    A collective that is split into a start and a done counts once. TPU programs split a collective that overlaps with
    other work into several fusions, the first of which starts the collective. They express a reduce-scatter as an
    all-reduce in a fusion named `all-reduce-scatter`.
    """
    counts, sent = Counter(), Counter()
    uncounted_loops = 0
    for name, instruction in module.instructions():
        if module.times[name] and (found := collective(module, name, instruction)):
            kind, size = found
            counts[kind] += module.times[name]
            sent[kind] += round(module.times[name] * size)
            uncounted_loops += name in module.unread_loops
    return Collectives(
        {kind: Traffic(counts[kind], sent[kind]) for kind in COLLECTIVE_KINDS if counts[kind]}, uncounted_loops
    )


def collective(module: Module, name: str, instruction: Instruction) -> tuple[str, float] | None:
    """Return the kind of the collective that an instruction of the computation `name` is or starts, and the bytes that
    one device sends; None if the instruction does neither, or if the collective involves one device only."""
    kind = instruction.op.removesuffix("-start")
    if kind not in COLLECTIVE_KINDS or _continues(instruction, module.computations[name]):
        return None
    size, group = array_bytes(result_shape(instruction)), _group_size(instruction.attributes, module.devices)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind, size = "reduce-scatter", size // group
    return (kind, float(_SENT[kind](size, group))) if group > 1 else None


def _continues(instruction: Instruction, computation: Computation) -> bool:
    """Whether this instruction continues a collective that another fusion started."""
    starts = any('custom_call_target="AsyncCollectiveStart"' in x.attributes for x in computation.instructions.values())
    return "chain_id=" in instruction.attributes and not starts


def result_shape(instruction: Instruction) -> str:
    """Return the shape of the result of an instruction. The shape of a start may also list operands and tokens."""
    if instruction.op in ("all-gather-start", "collective-permute-start") or instruction.shape.startswith("(("):
        return split(instruction.shape[1:-1])[1]
    return instruction.shape


def _group_size(attributes: str, devices: int) -> int:
    """Return the number of devices in each group of a collective; for a permutation, the number of all devices."""
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
