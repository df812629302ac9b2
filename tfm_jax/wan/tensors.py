"""Reads and writes named tensors in files part by part, so that no whole file is ever held in memory."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from tfm_jax.errors import InputError
from tfm_jax.inputs import MAX_JSON_BYTES, check_download, parse_json, read_json, short_repr

Index = tuple[slice | int, ...] | EllipsisType
Shape = tuple[int, ...]

MAX_SHARD_BYTES = 5_000_000_000
STRIP = 256
"""Number of elements along the last axis that `copy_into` copies at a time."""
FILL_BYTES = 2**20
"""Number of zeros that `allocate` writes at a time on systems without `posix_fallocate`."""

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
FP8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_NAMES = {np.dtype(dtype): name for name, dtype in {**DTYPES, "U8": np.uint8}.items()}


class LazyTensor(NamedTuple):
    """A tensor in a file, to be read on demand. `read(index)` returns the part that `index` selects."""

    shape: Shape
    file: Path
    read: Callable[[Index], np.ndarray]
    fp8: bool = False
    """Whether the numbers have 8 bits. `tfm_jax.wan.weights` finds their scales."""


Tensors = Mapping[str, LazyTensor]


# --- Reading ---------------------------------------------------------------------------------------------------------


def safetensors_in(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory: those listed in its index, or all of them if it has no index.

    Raises:
        InputError: there is no such file, or the index is damaged or lists a file that is not in the directory.
    """
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise InputError(f"{directory}: no *.safetensors files found; expected at least one")
        return files
    index = indices[0]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is {short_repr(weight_map)}; expected a file for every tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(
                f"{index}: {short_repr(name)} is in {short_repr(shard)}; expected a file in the same directory"
            )
    files = [directory / shard for shard in sorted(set(weight_map.values()))]
    for file in files:
        if not os.path.isfile(file):  # Path.is_file raises OSError for a name that is too long
            raise InputError(f"{file}: the file is missing, but {index.name} lists it; download it again")
    return files


def open_safetensors(
    file: Path, dtypes: Mapping[str, DTypeLike] = DTYPES, skipped: Collection[str] = ()
) -> dict[str, LazyTensor]:
    """Map the names in one safetensors file to its tensors.

    Args:
        dtypes: the accepted dtypes, by their names in the format.
        skipped: names of tensors that are left out.

    Raises:
        InputError: the file is missing or not safetensors, repeats a tensor, or has a tensor with another dtype.
    """
    handle = _open(file)
    header, start = _header(file)
    tensors = {}
    for name in handle.keys():  # noqa: SIM118, not a dict
        if name in skipped:
            continue
        piece = handle.get_slice(name)
        dtype, shape = piece.get_dtype(), tuple(piece.get_shape())
        if dtype not in dtypes:
            raise InputError(
                f"{file}: tensor {short_repr(name)} has dtype {dtype}; expected one of {', '.join(dtypes)}"
            )
        if dtype in FP8:
            read = _reader(file, start + header[name]["data_offsets"][0], FP8[dtype], shape)
            tensors[name] = LazyTensor(shape, file, read, fp8=True)
        else:
            tensors[name] = LazyTensor(shape, file, piece.__getitem__)
    return tensors


def _reader(file: Path, offset: int, dtype: DTypeLike, shape: Shape) -> Callable[[Index], np.ndarray]:
    """Return the `read` of a tensor whose dtype NumPy lacks: safetensors cannot return it as an array."""

    def read(index: Index) -> np.ndarray:
        data = np.memmap(file, np.uint8, "r", offset, (_nbytes(shape, dtype),))
        return np.array(data.view(dtype).reshape(shape)[index])

    return read


def safetensors_names(file: Path) -> list[str]:
    """Return the names in a safetensors file, which may have tensors that `open_safetensors` does not accept.

    Raises:
        InputError: the file is missing or not safetensors.
    """
    return list(_open(file).keys())


def _open(file: Path) -> Any:
    check_download(file)
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a complete safetensors file ({error}); download it again") from None


def safetensors_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file that `open_safetensors` has accepted."""
    return _header(file)[0].get("__metadata__") or {}


def safetensors_dtypes(file: Path) -> dict[str, np.dtype]:
    """Map the names in a safetensors file that `open_safetensors` has accepted to dtypes."""
    header, _ = _header(file)
    return {name: np.dtype(DTYPES[about["dtype"]]) for name, about in header.items() if name != "__metadata__"}


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header and the position at which the tensors start.

    The header is parsed strictly, because safetensors itself accepts repeated keys and uses the last one.
    """
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return parse_json(stream.read(min(length, MAX_JSON_BYTES + 1)), f"{file}: header"), 8 + length


# --- Writing ---------------------------------------------------------------------------------------------------------


class TensorWriter:
    """Creates safetensors files for tensors of known shapes. Fill them in any order: `writer[name][...] = values`.

    The files are memory-mapped, so values go to disk and do not stay in memory. Use the writer as a context manager.

    Args:
        stem: start of the file names, as in `stem.safetensors` or `stem-00001-of-00002.safetensors`.
        tensors: name -> shape and dtype.
        max_bytes: maximum size of a file with several tensors.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        tensors: Mapping[str, tuple[Shape, DTypeLike]],
        max_bytes: int = MAX_SHARD_BYTES,
    ):
        self._views: dict[str, np.ndarray] = {}
        self._maps: list[np.memmap] = []
        shards = _shards(tensors, max_bytes)
        weight_map = {}
        for number, names in enumerate(shards, 1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = directory / f"{stem}{part}.safetensors"
            self._create(file, {name: tensors[name] for name in names})
            weight_map |= dict.fromkeys(names, file.name)
        if len(shards) > 1:
            total = sum(_nbytes(*spec) for spec in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _create(self, file: Path, tensors: Mapping[str, tuple[Shape, DTypeLike]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in tensors.items():
            end = offset + _nbytes(shape, dtype)
            header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": shape, "data_offsets": (offset, end)}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with open(file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            allocate(stream, offset)
        data = np.memmap(file, np.uint8, "r+", offset=0)
        self._maps.append(data)
        for name, (shape, dtype) in tensors.items():
            begin, end = (start + position for position in header[name]["data_offsets"])  # type: ignore[index]
            self._views[name] = data[begin:end].view(dtype).reshape(shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for data in self._maps:
            data.flush()
        self._views.clear()
        self._maps.clear()


def copy_into(target: np.ndarray, values: np.ndarray) -> None:
    """Equivalent to `target[...] = values`, but four times as fast for transposed `values`.

    Casts the values in their memory order, then copies strips narrow enough for source and target to stay in the cache.
    """
    values = values.astype(target.dtype, copy=False)
    for start in range(0, target.shape[-1], STRIP):
        target[..., start : start + STRIP] = values[..., start : start + STRIP]


def allocate(stream: BinaryIO, size: int) -> None:
    """Allocate `size` bytes on disk, starting at the position of `stream`.

    On a full disk this raises OSError, whereas writing to a memory-mapped file would crash the program.
    """
    try:
        stream.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, stream.tell() + size)
            return
        for start in range(0, size, FILL_BYTES):  # macOS has no posix_fallocate, and truncate allocates no space
            stream.write(bytes(min(FILL_BYTES, size - start)))
    except OSError as error:
        raise OSError(error.errno, error.strerror, stream.name) from None


def _nbytes(shape: Shape, dtype: DTypeLike) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _shards(tensors: Mapping[str, tuple[Shape, DTypeLike]], max_bytes: int) -> list[list[str]]:
    """Split the names, in order, into groups of at most `max_bytes`. A larger tensor gets a group of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, (shape, dtype) in tensors.items():
        nbytes = _nbytes(shape, dtype)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards
