"""What one run of an instruction of a compiled program costs: operations of matrix products, and bytes in main memory.

The bytes are those of the operands and of the results that are in main memory (HBM). Of an array that an instruction
only slices, the slice counts, and of an array that it updates in place, the update.
"""

import json
import math
import re

from tfm_jax.planning.hlo import (
    COLLECTIVE_KINDS,
    Computation,
    Instruction,
    Module,
    arrays,
    buffer_bytes,
    called,
    result_shape,
    sizes,
    split,
)

ATTENTION_KERNELS = {
    "splash_mha_fwd": 2,
    "splash_mha_bwd": 5,
    "fmhaSoftmaxBackward": 5,
    "fmhaSoftmax": 2,
}
"""Name of an attention kernel, or its beginning -> the number of its matrix products, each of which multiplies as often
as the scores. These are the kernels of JAX's splash attention for TPUs and of cuDNN for NVIDIA GPUs."""

_KERNEL_TARGETS = ("tpu_custom_call", "__cudnn$", "__cublas$", "__gpu$", "triton")
"""Beginnings of the targets of custom calls that may compute matrix products."""

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id", "opt-barrier"}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


def flops(module: Module, name: str, instruction: Instruction) -> int:
    """Return the operations of the matrix products of an instruction of the computation `name`; 0 if unknown."""
    operands = module.computations[name].instructions
    if instruction.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return _product(instruction, operands[instruction.operands[0]], sizes(contracted[1] if contracted else ""))
    if instruction.op == "convolution":
        return _convolution(instruction, *(arrays(operands[x].shape)[0] for x in instruction.operands[:2]))
    if instruction.op == "custom-call":
        return _custom_call(instruction, [operands[x] for x in instruction.operands])
    return sum(flops(module, inner, x) for inner, x in fused(module, instruction))


def fused(module: Module, instruction: Instruction) -> list[tuple[str, Instruction]]:
    """Return the instructions that run as parts of this one, each after the name of its computation."""
    if instruction.op not in ("fusion", "async-start", "call-start"):
        return []
    return [(inner, x) for inner in called(instruction) for x in module.computations[inner].instructions.values()]


def unknown_kernel(instruction: Instruction) -> bool:
    """Whether an instruction is a kernel whose matrix products, if any, are not counted."""
    if instruction.op != "custom-call":
        return False
    target = custom_call_target(instruction)
    known = attention_kernel(instruction) or target.startswith("__cublas$")
    return target.startswith(_KERNEL_TARGETS) and not known


def custom_call_target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def attention_kernel(instruction: Instruction) -> str | None:
    """Return the key of `ATTENTION_KERNELS` of a custom call; None for other instructions."""
    if instruction.op != "custom-call":
        return None
    target = custom_call_target(instruction)
    text = instruction.name if target == "tpu_custom_call" else target
    return next((kernel for kernel in ATTENTION_KERNELS if kernel in text), None)


def bytes_moved(module: Module, name: str, instruction: Instruction) -> int:
    """Return the bytes that an instruction of the computation `name` reads from main memory and writes to it."""
    op, computation = instruction.op, module.computations[name]
    if op in _FREE or op.endswith(("-done", "-update")) or custom_call_target(instruction) == "AllocateBuffer":
        return 0
    if op == "copy-start":  # its shape lists the copy and the original
        return buffer_bytes(instruction.shape, hbm_only=True)
    if op in ("async-start", "call-start"):
        inner = called(instruction)[0]
        return bytes_moved(module, inner, module.computations[inner].instructions[module.computations[inner].root])
    operands = [computation.instructions[x] for x in instruction.operands]
    wholes = [buffer_bytes(x.shape, hbm_only=True) for x in operands]
    if op == "fusion":
        inner = module.computations[called(instruction)[0]]
        read = sum(
            _read(module, inner, parameter, whole) for parameter, whole in zip(inner.parameters, wholes, strict=True)
        )
        return read + _written(module, inner, instruction)
    result = result_shape(instruction)
    written, op = buffer_bytes(result, hbm_only=True), op.removesuffix("-start")
    if op in _SLICES:
        return min(wholes[0], buffer_bytes(result)) + written
    if op == "dynamic-update-slice":
        return wholes[1] + min(written, buffer_bytes(operands[1].shape))
    return sum(wholes) + written


def _read(module: Module, computation: Computation, value: str, whole: int) -> int:
    """Return how many of the `whole` bytes of a value a fused computation reads."""
    total = 0
    for user in computation.users[value]:
        if user.op in _SLICES and user.operands[0] == value:
            total += buffer_bytes(user.shape)
        elif user.op in ("bitcast", "fusion"):
            total += _read_by(module, computation, user, value, whole)
        elif not (_in_place(user, value) or _passes_on(user)):
            return whole
    return min(total, whole)


def _read_by(module: Module, computation: Computation, user: Instruction, value: str, whole: int) -> int:
    if user.op == "bitcast":
        return _read(module, computation, user.name, whole)
    inner = module.computations[called(user)[0]]
    passed = [parameter for parameter, x in zip(inner.parameters, user.operands, strict=True) if x == value]
    return sum(_read(module, inner, parameter, whole) for parameter in passed)


def _in_place(user: Instruction, value: str) -> bool:
    return user.op == "dynamic-update-slice" and user.operands[0] == value


def _passes_on(user: Instruction) -> bool:
    """Whether an instruction only hands a buffer on: out of the fusion, or to a collective in progress."""
    return user.op in ("tuple", *COLLECTIVE_KINDS) or custom_call_target(user).startswith("AsyncCollective")


def _written(module: Module, computation: Computation, fusion: Instruction) -> int:
    """Return the bytes that a fusion writes."""
    root = computation.instructions[computation.root]
    if root.op != "tuple":
        return _result(module, computation, root, fusion.shape)
    shapes = split(fusion.shape[1:-1])
    outputs = [computation.instructions[x] for x in root.operands]
    return sum(_result(module, computation, x, shape) for x, shape in zip(outputs, shapes, strict=True))


def _result(module: Module, computation: Computation, value: Instruction, shape: str) -> int:
    whole = buffer_bytes(shape, hbm_only=True)
    while value.op == "bitcast":
        value = computation.instructions[value.operands[0]]
    if value.op == "parameter" or _passes_on(value):
        return 0
    if value.op == "dynamic-update-slice":
        return min(whole, buffer_bytes(computation.instructions[value.operands[1]].shape))
    if value.op == "fusion" and not value.shape.startswith("("):
        return min(whole, _written(module, module.computations[called(value)[0]], value))
    return whole


def _product(instruction: Instruction, left: Instruction, contracted: list[int]) -> int:
    """Return the operations of a matrix product, from the result and from the contracted axes of the left operand."""
    axes = arrays(left.shape)[0]
    return 2 * math.prod(arrays(instruction.shape)[0]) * math.prod(axes[axis] for axis in contracted)


def _convolution(instruction: Instruction, left: list[int], kernel: list[int]) -> int:
    """Return the operations of a convolution, which is how TPU programs express matrix products."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction.attributes[:200]
    result = arrays(instruction.shape)[0]
    total = 2 * kernel[labels[2].index("i")] * math.prod(result[labels[3].index(axis)] for axis in "bf")
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)  # missing without spatial axes
    settings = {name: values.split("x") for name, values in re.findall(r"(\w+)=(\S+)", window[1] if window else "")}
    for axis in sorted(set(labels[3]) - {"b", "f"}):
        lengths = (left[labels[1].index(axis)], kernel[labels[2].index(axis)], result[labels[3].index(axis)])
        total *= _overlaps(*lengths, {name: values[int(axis)] for name, values in settings.items()})
    return total


def _overlaps(length: int, size: int, outputs: int, settings: dict[str, str]) -> int:
    """Count the pairs of a position of the result and a position of the kernel that meet an element of the input."""
    stride, spread, gap = (int(settings.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    start = int(settings.get("pad", "0_0").split("_")[0])
    places = (out * stride + tap * gap - start for out in range(outputs) for tap in range(size))
    return sum(place % spread == 0 and 0 <= place // spread < length for place in places)


def _custom_call(instruction: Instruction, operands: list[Instruction]) -> int:
    if kernel := attention_kernel(instruction):
        return ATTENTION_KERNELS[kernel] * _scores(kernel, operands)
    if custom_call_target(instruction).startswith("__cublas$"):
        found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes)
        return _product(instruction, operands[0], [int(x) for x in json.loads(found[1])]) if found else 0
    return 0


def _scores(kernel: str, operands: list[Instruction]) -> int:
    """Return the operations of the product of queries and keys. Splash has `[... n s k]`, cuDNN `[b s n k]`."""
    query, key = (arrays(x.shape)[0] for x in operands[:2])
    tokens = -2 if kernel.startswith("splash") else 1
    return 2 * math.prod(query) * key[tokens]
