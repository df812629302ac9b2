"""Reads the tensors of PyTorch's `.pth` files without PyTorch.

Such a file is a zip archive: `data.pkl` describes the tensors, and each record `data/<key>` is one storage, raw and
uncompressed. A general unpickler would execute whatever code the file names. Here a stack machine with about thirty
opcodes evaluates the description and calls nothing. It recognises the calls that create a dictionary or a plain tensor.
Any other call becomes a `_Call`, which is an error if found in place of a tensor. Memory use is at most a small
multiple of the size of `data.pkl`.
"""

import io
import itertools
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tfm_jax.errors import InputError
from tfm_jax.inputs import check_download, short_repr
from tfm_jax.wan.tensors import LazyTensor, Shape, Tensors

MAX_DESCRIPTION_BYTES = 2**20
"""Maximum size of `data.pkl` and of the directory of the zip archive. In Wan's files both are below 100 kB."""

_DTYPES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
}


_DAMAGED = (zipfile.BadZipFile, struct.error, NotImplementedError, RuntimeError, ValueError, ArithmeticError, OSError)
"""The exceptions that zipfile raises for a damaged archive."""


class _Global(NamedTuple):
    """A function or class that `data.pkl` names."""

    name: str


class _Call(NamedTuple):
    """A call that `data.pkl` asks for. It is never executed."""

    name: str
    arguments: tuple


class _Storage(NamedTuple):
    class_name: str
    key: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: Shape
    strides: Shape


class _Region(NamedTuple):
    """The byte range of a tensor in the file."""

    start: int
    stop: int
    dtype: np.dtype
    shape: Shape


def open_pth(file: Path) -> Tensors:
    """Map names to the tensors of a PyTorch checkpoint: a plain dictionary of contiguous floating-point tensors.

    Raises:
        InputError: the file is missing, the checkpoint is anything else, or its records are compressed, overlapping or
            incomplete.
    """
    check_download(file)
    try:
        description, storages = _read_archive(file)
        regions = dict(_regions(_evaluate(description), storages))
        _check_apart(regions)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    data = np.memmap(file, np.uint8, "r")
    return {
        name: LazyTensor(shape, file, data[start:stop].view(dtype).reshape(shape).__getitem__)
        for name, (start, stop, dtype, shape) in regions.items()
    }


# --- The archive -----------------------------------------------------------------------------------------------------


class _BoundedFile(io.FileIO):
    """A file that refuses large reads. zipfile reads an archive's directory at once, however large it claims to be."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DESCRIPTION_BYTES:
            raise InputError(f"a record or the directory has {size} bytes; expected at most {MAX_DESCRIPTION_BYTES}")
        return super().read(MAX_DESCRIPTION_BYTES if size is None or size < 0 else size) or b""


def _read_archive(file: Path) -> tuple[bytes, dict[str, range]]:
    """Return the pickled description and the byte range of each storage by key."""
    with _BoundedFile(file) as stream:
        if stream.read(4) != b"PK\3\4":
            raise InputError(
                "not a zip archive, the format that PyTorch has used since version 1.6; convert an older file with "
                "torch.load and torch.save"
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                records = _records(archive, stream)
                found = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
                if len(found) != 1:
                    raise InputError(f"the zip archive contains {len(found)} data.pkl; expected exactly one")
                root = found[0].removesuffix("data.pkl")
                description = archive.read(found[0])
                order = archive.read(f"{root}byteorder") if f"{root}byteorder" in records else b"little"
        except InputError:
            raise
        except _DAMAGED as error:
            raise InputError(f"not a complete zip archive ({error}); download it again") from None
    if order != b"little":
        raise InputError(f"byteorder is {short_repr(order)}; expected little")
    start = f"{root}data/"
    return description, {name.removeprefix(start): span for name, span in records.items() if name.startswith(start)}


def _records(archive: zipfile.ZipFile, stream: io.FileIO) -> dict[str, range]:
    """Map record names to byte ranges. Check that every record is uncompressed and that none overlaps another."""
    records: dict[str, range] = {}
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.filename
        if name in records:
            raise InputError(f"record {short_repr(name)} is in the archive more than once; expected it once")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise InputError(
                f"record {short_repr(name)} is compressed or encrypted; expected plain bytes, as PyTorch writes them"
            )
        stream.seek(info.header_offset)
        header = stream.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise InputError(f"record {short_repr(name)} is not where the archive says; download the file again")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))  # lengths of name and extra field
        if info.header_offset < end or start + info.file_size > archive.start_dir:
            raise InputError(
                f"record {short_repr(name)} overlaps another record or the directory; expected separate records"
            )
        end = start + info.file_size
        records[name] = range(start, end)
    return records


# --- The description -------------------------------------------------------------------------------------------------

_MARK = object()
_VALUES = frozenset(["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"])
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _evaluate(pickled: bytes) -> Any:
    """Evaluate a pickle to plain values, tuples, dictionaries with string keys, and instances of the types above."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            machine.step(opcode.name, argument)
        (result,) = machine.stack
    except InputError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):
        raise InputError("data.pkl is damaged; download the file again") from None
    return result


class _Machine:
    """Pickle's stack machine, limited to the opcodes that PyTorch uses for a dictionary of tensors."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            stack[-_TUPLES[opcode] :] = [tuple(stack[-_TUPLES[opcode] :])]
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            self._build(opcode, argument)

    def _build(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], key, value)
            case "SETITEMS":
                items = self._since_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _set(stack[-1], key, value)
            case "GLOBAL":
                stack.append(_Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Global(f"{module}.{name}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_result(function.name, tuple(arguments)))
            case "BUILD":  # drops attributes of the dictionary, such as module versions
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise InputError(f"the target of BUILD is {_describe(stack[-1])}; expected a dictionary of tensors")
            case _:
                raise InputError(f"data.pkl has the opcode {opcode}; expected a dictionary of plain tensors")

    def _since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]


def _set(target: Any, key: Any, value: Any) -> None:
    if not isinstance(target, dict):
        raise InputError(f"the target of SETITEM is {_describe(target)}; expected a dictionary of tensors")
    if not isinstance(key, str):
        raise InputError(f"a dictionary has a key that is {_describe(key)}; expected tensor names")
    if key in target:
        raise InputError(f"key {short_repr(key)} is given more than once; expected it once")
    target[key] = value


def _storage(identifier: Any) -> _Storage:
    match identifier:
        case ("storage", _Global(class_name), str(key), str(), int(length)):
            return _Storage(class_name, key, length)
    raise InputError("data.pkl refers to something that is not a storage; expected plain tensors")


def _result(name: str, arguments: tuple) -> Any:
    match name, arguments:
        case "collections.OrderedDict", ():
            return {}
        # The last two arguments are requires_grad and hooks. A seventh, metadata, can negate or conjugate the values.
        case "torch._utils._rebuild_tensor_v2", (
            _Storage() as storage,
            int(offset),
            tuple(shape),
            tuple(strides),
            _,
            _,
        ):
            return _Tensor(storage, offset, shape, strides)
        case "torch._utils._rebuild_parameter", (_Tensor() as tensor, _, _):
            return tensor
    return _Call(name, arguments)


def _describe(value: Any) -> str:
    """Describe a value in words that can follow "is" in an error message."""
    match value:
        case _Call(name, _):
            return f"the result of {short_repr(name)}"
        case _Global(name):
            return short_repr(name)
    return f"of type {type(value).__name__.lstrip('_').lower()}"


# --- The tensors -----------------------------------------------------------------------------------------------------


def _regions(state: Any, storages: Mapping[str, range]) -> Iterator[tuple[str, _Region]]:
    if not isinstance(state, dict):
        raise InputError(f"the content is {_describe(state)}; expected a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, _Tensor):
            raise InputError(f"{short_repr(name)} is {_describe(tensor)}; expected a plain tensor")
        yield name, _region(name, tensor, storages)


def _region(name: str, tensor: _Tensor, storages: Mapping[str, range]) -> _Region:
    storage, offset, shape, strides = tensor
    if storage.class_name not in _DTYPES:
        raise InputError(
            f"tensor {short_repr(name)} is in a {storage.class_name}; expected one of {', '.join(_DTYPES)}"
        )
    if not all(type(number) is int and number >= 0 for number in (storage.length, offset, *shape, *strides)):
        raise InputError(
            f"tensor {short_repr(name)} has a bad storage length, offset, shape or strides; expected integers >= 0"
        )
    dtype = np.dtype(_DTYPES[storage.class_name])
    record = storages.get(storage.key)
    if record is None or len(record) != storage.length * dtype.itemsize:
        has = "no record" if record is None else f"a record of {len(record)} bytes"
        raise InputError(
            f"tensor {short_repr(name)} has {has}; expected a record of {storage.length * dtype.itemsize} bytes"
        )
    length = math.prod(shape)
    if len(shape) != len(strides) or offset + length > storage.length or not _contiguous(shape, strides):
        raise InputError(
            f"tensor {short_repr(name)} is not contiguous or exceeds its storage; expected contiguous data"
        )
    start = record.start + offset * dtype.itemsize
    return _Region(start, start + length * dtype.itemsize, dtype, shape)


def _contiguous(shape: Shape, strides: Shape) -> bool:
    """Whether a tensor is in C order. The strides of empty tensors and of axes of length 1 do not matter."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return 0 in shape
        expected *= length
    return True


def _check_apart(regions: Mapping[str, _Region]) -> None:
    """Check that tensors do not overlap. Tensors with the same bytes and dtype are allowed (tied weights)."""
    filled = [(name, region) for name, region in regions.items() if region.start < region.stop]
    ordered = sorted(filled, key=lambda item: item[1][:2])
    for (first, one), (second, other) in itertools.pairwise(ordered):
        if other.start < one.stop and other[:3] != one[:3]:
            raise InputError(
                f"tensors {short_repr(first)} and {short_repr(second)} overlap in the file; expected separate tensors"
            )
