"""List the operations of a compiled program in the order in which they run, with what each of them costs.

An operation is an instruction outside fusions: a fusion counts as one operation, which reads its operands and writes
its results once.
"""

import re
from typing import NamedTuple

from tfm_jax.planning import costs, hlo
from tfm_jax.planning.hlo import Instruction, Module

_CONTROL = ("while", "conditional", "call")
_STARTS, _ENDS = "AsyncCollectiveStart", "AsyncCollectiveDone"
_MOVES = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy", "transpose", "reshape",
    "slice", "dynamic-slice", "dynamic-update-slice", "pad", "concatenate", "broadcast", "gather", "convert",
}  # fmt: skip
"""Instructions that only move data. A conversion of the dtype counts as one, since it comes with a copy for free."""


class Operation(NamedTuple):
    """An instruction and the costs of one run of it on one device."""

    computation: str
    name: str
    shape: str
    scope: str
    """Where in the model's code the operation comes from, such as `jit(step)/jvp(...)/self_attn/lora/dot_general`. For
    a fusion with matrix products, this is the scope of the largest product."""
    times: int
    """How often the operation runs in one execution of the program."""
    flops: int
    """Operations of matrix products."""
    bytes: int
    """Bytes read from main memory and written to it."""
    collective: str | None
    """Kind of the collective that the operation is, or starts."""
    sent: float
    """Bytes sent to other devices."""
    kernel: bool
    """Whether it is an attention kernel."""
    unknown: bool
    """Whether it is a kernel whose matrix products, if any, are not counted."""
    moves: bool
    """Whether it only moves data."""
    cycles: int
    """The compiler's estimate of the clock cycles of one run; 0 without an estimate."""
    between: tuple[str, ...] | None
    """For an operation that only starts something: the names of the instructions that run before the program waits for
    it. None for all others."""
    calls: tuple[tuple[str, int], ...]
    """For a loop or another instruction that only runs computations: their names, and how often each runs."""


def list_operations(module: Module) -> dict[str, list[Operation]]:
    """Return, for each computation outside fusions, its operations in the order in which they run."""
    found: dict[str, list[Operation]] = {}
    waiting = [module.entry]
    while waiting:
        name = waiting.pop()
        if name not in found:
            instructions = module.computations[name].instructions.values()
            found[name] = [_operation(module, name, x) for x in instructions if not _ends(module, x)]
            waiting += [called for operation in found[name] for called, _ in operation.calls]
    return found


def _operation(module: Module, name: str, instruction: Instruction) -> Operation:
    parts = [(name, instruction), *_parts(module, instruction)]
    products = {x.name: costs.flops(module, inner, x) for inner, x in parts if x.op in ("dot", "convolution")}
    largest = max(products, key=lambda x: products[x], default=instruction.name)
    scopes = {x.name: _scope(x) for _, x in parts if _scope(x)}
    sent = [found for inner, x in parts if (found := hlo.collective(module, inner, x))]
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return Operation(
        name,
        instruction.name,
        instruction.shape,
        scopes.get(largest) or next(iter(scopes.values()), ""),
        module.times[name],
        costs.flops(module, name, instruction),
        costs.bytes_moved(module, name, instruction),
        sent[0][0] if sent else None,
        sum((size for _, size in sent), 0.0),
        any(costs.attention_kernel(x) for _, x in parts),
        any(costs.unknown_kernel(x) for _, x in parts),
        all(x.op.removesuffix("-start") in _MOVES or costs.fused(module, x) for _, x in parts),
        int(cycles[1]) if cycles else 0,
        _between(module, name, instruction),
        tuple(module.calls(name, instruction)) if instruction.op in _CONTROL else (),
    )


def _parts(module: Module, instruction: Instruction) -> list[tuple[str, Instruction]]:
    """Return all instructions inside an instruction, also those of fusions inside it, with their computations."""
    parts = costs.fused(module, instruction)
    return parts + [nested for _, part in parts for nested in _parts(module, part)]


def _scope(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^":]*)', instruction.attributes)  # combined transfers list several, after colons
    return found[1] if found else ""


def _ends(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction only waits for what another one started."""
    return instruction.op.endswith(("-done", "-update")) or _calls_target(module, instruction, _ENDS)


def _calls_target(module: Module, instruction: Instruction, target: str) -> bool:
    return any(costs.custom_call_target(x) == target for _, x in costs.fused(module, instruction))


def _between(module: Module, name: str, start: Instruction) -> tuple[str, ...] | None:
    """Return the names of the instructions between an asynchronous start and its end; None if it is no such start."""
    if start.op.endswith("-start"):
        end = _done(module, name, start)
    elif _calls_target(module, start, _STARTS):
        end = _matching_end(module, name, start)
    else:
        return None
    names = list(module.computations[name].instructions)
    return tuple(names[names.index(start.name) + 1 : names.index(end.name)]) if end else ()


def _done(module: Module, name: str, start: Instruction) -> Instruction | None:
    users = module.computations[name].users
    following = next((x for x in users[start.name] if x.op.endswith(("-done", "-update"))), None)
    return _done(module, name, following) if following and following.op.endswith("-update") else following


def _matching_end(module: Module, name: str, start: Instruction) -> Instruction | None:
    """Return the fusion that ends a collective which a fusion of a TPU program starts."""
    chain = _chain(module, start)
    instructions = list(module.computations[name].instructions.values())
    later = instructions[instructions.index(start) + 1 :]
    return next((x for x in later if _calls_target(module, x, _ENDS) and _chain(module, x) == chain), None)


def _chain(module: Module, instruction: Instruction) -> list[str]:
    """Return the identifiers of the collective that several fusions work on."""
    found = [x for _, x in costs.fused(module, instruction) if "chain_id=" in x.attributes]
    return re.findall(r'(?:channel_id=|chain_id=")\d+', found[0].attributes) if found else []
