"""Read and verify one checkpoint. If one process finds damage, all processes raise the same error."""

import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils
from jaxtyping import Array

from tfm_jax import processes
from tfm_jax.checkpoint.fingerprints import fingerprints
from tfm_jax.checkpoint.record import DamagedError, Record, read_record
from tfm_jax.checkpoint.trees import Arrays
from tfm_jax.errors import InputError
from tfm_jax.sharding import one_device_mesh, replicated

T = TypeVar("T")

MakeTarget = Callable[[dict[str, Any]], Arrays]
"""Maps the metadata of a checkpoint to the abstract arrays to load, with their shardings."""


class Restored(NamedTuple):
    """A checkpoint that has been read and verified."""

    step: int
    arrays: dict[str, Array]
    metadata: dict[str, Any]
    """The metadata that was saved, after a round trip through JSON."""


def read_checkpoint(checkpoint: Path, make_target: MakeTarget | None) -> Restored:
    """Read a checkpoint and verify every array.

    Args:
        checkpoint: folder of the checkpoint; the name of the folder is the step.
        make_target: by default, all arrays are loaded onto one device.

    Raises:
        DamagedError: the checkpoint differs from what was saved; all processes raise this if one of them finds damage.
        InputError: `make_target` raised it, the arrays of the checkpoint differ from those of the target, or version
            0.1.0 wrote the checkpoint.
    """
    record = _on_all_processes(lambda: read_record(checkpoint))
    target = _on_one_device(record) if make_target is None else make_target(record.metadata)
    _check_target(checkpoint, record, target)
    arrays = _on_all_processes(lambda: read_arrays(checkpoint, target))
    for name, fingerprint in fingerprints(arrays).items():
        if fingerprint != record.arrays[name]["fingerprint"]:
            raise DamagedError(f"the values of {name} differ from those that were saved")
    return Restored(record.step, arrays, record.metadata)


def read_metadata(checkpoint: Path) -> dict[str, Any] | None:
    """Return the metadata of a checkpoint, or None if they are damaged.

    Raises:
        InputError: version 0.1.0 wrote the checkpoint.
    """
    try:
        return read_record(checkpoint).metadata
    except Exception as error:
        if isinstance(error, InputError) or _is_unrelated_to_damage(error):
            raise
        return None


def read_arrays(checkpoint: Path, target: Arrays) -> dict[str, Array]:
    """Read arrays in Orbax's format with TensorStore. Each process reads only what its devices need.

    Orbax itself would wait for the other processes while reading, and its threads would print tracebacks if a file is
    damaged.
    """
    base = {"driver": "file", "path": f"{checkpoint / 'state'}/"}
    stores = {
        name: tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}},
            open=True,
            read=True,
            dtype=array.dtype,
            shape=array.shape,
        )
        for name, array in target.items()
    }

    def read(name: str, index: Any) -> np.ndarray:
        return stores[name].result()[index].read().result()

    return {
        name: jax.make_array_from_callback(array.shape, array.sharding, partial(read, name))
        for name, array in target.items()
    }


def _on_one_device(record: Record) -> Arrays:
    sharding = replicated(one_device_mesh())
    return {
        name: jax.ShapeDtypeStruct(tuple(array["shape"]), array["dtype"], sharding=sharding)
        for name, array in record.arrays.items()
    }


def _check_target(checkpoint: Path, record: Record, target: Arrays) -> None:
    """Raise InputError unless the checkpoint has exactly the arrays of the target."""
    for name in sorted(record.arrays.keys() ^ target.keys()):
        problem = "is missing" if name in target else "does not belong to this run"
        raise InputError(f"{checkpoint}: {name} {problem}; resume with the configuration that the run was started with")
    for name, array in target.items():
        shape, dtype = record.arrays[name]["shape"], record.arrays[name]["dtype"]
        if (shape, dtype) != (list(array.shape), str(array.dtype)):
            expected = f"{array.dtype}{list(array.shape)}"
            raise InputError(f"{checkpoint}: {name} is {dtype}{shape}; this configuration needs {expected}")


# --- Agreement of the processes --------------------------------------------------------------------------------------


def _on_all_processes(read: Callable[[], T]) -> T:
    """Return the result of `read` if no process finds damage; otherwise raise the same DamagedError on all processes.

    InputError, and exceptions that are unrelated to damage, are raised as they are.
    """
    result, reason = None, ""
    try:
        result = read()
    except DamagedError as damage:
        reason = str(damage)
    except Exception as error:  # damaged files make JSON and TensorStore raise exceptions of many types
        if isinstance(error, InputError) or _is_unrelated_to_damage(error):
            raise
        reason = f"reading failed: {one_line(error)}"
    if reason := first_text(reason):
        raise DamagedError(reason)
    return result  # pyright: ignore[reportReturnType]


def _is_unrelated_to_damage(error: Exception) -> bool:
    """Whether an exception has a cause other than damaged files: out of memory, a failed device, no permission."""
    types = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
    texts = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")
    return isinstance(error, types) or any(text in str(error) for text in texts)


def one_line(error: Exception) -> str:
    """Return the type and the message of an exception, shortened to one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")


def first_text(text: str) -> str:
    """Return the first non-empty `text` in process order, or "" if there is none. All processes must call this."""
    if not processes.is_distributed():
        return text
    row = np.zeros(512, np.uint8)
    data = text.encode()[: row.size]
    row[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, row.size)
    return next(filter(None, (bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows)), "")
