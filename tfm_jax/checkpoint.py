"""Training checkpoints that are verified when they are read: a damaged one is set aside and the one before it is used.

Orbax (only this file imports it) writes the arrays, asynchronously and sharded. Nothing in its format notices every
change of the data, so each array has a fingerprint here, and the metadata, which holds the fingerprints, a checksum.
"""

import hashlib
import json
import logging
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Shaped, UInt32
from orbax.checkpoint import v1 as ocp

from tfm_jax import errors, hosts
from tfm_jax.errors import InputError, NonFiniteLoss
from tfm_jax.sharding import one_device_mesh, replicated

_training: Any = ocp.training  # its annotations do not take what its documentation passes

T = TypeVar("T")

Arrays = dict[str, Any]
"""Name -> array, or its abstract value with a sharding."""


class Restored(NamedTuple):
    """A checkpoint that was read and verified."""

    step: int
    arrays: dict[str, Array]
    metadata: dict[str, Any]
    """What `save` was given, after a round trip through JSON."""


def flatten(tree: Any) -> Arrays:
    """The leaves of any tree by the path to them."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(tree: Any, arrays: Arrays) -> Any:
    """`tree` with its leaves replaced by `arrays`, as `flatten` names them."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


# --- Fingerprints ----------------------------------------------------------------------------------------------------


def fingerprints(arrays: Mapping[str, Array]) -> dict[str, int]:
    """A hash of 64 bits of every array, by name. It does not depend on how an array is split over devices."""
    return {name: mark for name, (mark, _) in _examine(arrays).items()}


def _examine(arrays: Mapping[str, Array]) -> dict[str, tuple[int, bool]]:
    """The fingerprint of every array, and whether all of its values are finite."""
    results = {name: _digest(array) for name, array in arrays.items()}
    marks = {name: (np.asarray(sums), bool(finite)) for name, (sums, finite) in results.items()}
    return {name: (int(sums[0]) << 32 | int(sums[1]), finite) for name, (sums, finite) in marks.items()}


@jax.jit
def _digest(x: Shaped[Array, "..."]) -> tuple[UInt32[Array, "2"], Bool[Array, ""]]:
    """Two sums of words that mix the bits of an element with its place, and whether all elements are finite.

    Sums modulo 2^32 come out the same in any order. For a fixed place both words are bijections of the bits, so one
    changed element always changes both sums; other changes go unnoticed with a probability of about 2^-64.
    """
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    key = _mix(place + jnp.uint32(0x9E3779B9))  # without the constant, the first place would have the key 0
    first = _mix(bits ^ key)
    second = _mix(first + key)
    return jnp.stack([jnp.sum(word, dtype=jnp.uint32) for word in (first, second)]), jnp.isfinite(x).all()


def _mix(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3 (Appleby, 2011): a bijection; each input bit changes half of the output bits."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save.

    With `keep`, the number of newest ones that stay, it is the run's only writer: it sets damaged ones aside and
    removes what a killed run left unfinished. Without `keep` it only reads, also while the run is being trained.

    Several processes all make the same calls and get the same results.
    """

    def __init__(self, directory: Path, keep: int | None = None):
        self.directory = directory.absolute()
        self._keep = keep
        self._orbax: Any = None

    def save(self, step: int, arrays: Arrays, metadata: dict[str, Any]) -> None:
        """Save `arrays` and JSON `metadata` as the checkpoint after `step` steps, in the background.

        Raises:
            NonFiniteLoss: an array has a value that is not finite; nothing is written.
            InputError: there is a checkpoint of this step or a later one.
            InputError, OSError: this save or the one before cannot be written.
        """
        described = {}
        for name, (mark, finite) in _examine(arrays).items():
            if not finite:
                raise NonFiniteLoss(f"step {step}: {name} has values that are not finite; no checkpoint is written")
            array = arrays[name]
            described[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "fingerprint": mark}
        if hosts.is_first() and self.steps and self.steps[-1] >= step:  # Orbax would skip the save in silence
            raise InputError(f"{self.directory}: has step {self.steps[-1]} already; expected only steps before {step}")
        # As text, of which the checksum is taken: Orbax need not write numbers as they are written here.
        record = json.dumps({"step": step, "arrays": described, "metadata": metadata})
        try:
            self._writer().save_async(step, arrays, custom_metadata={"record": record, "sha256": _sha256(record)})
        except Exception as error:
            self._raise_failed_write(error)

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first. Some may be damaged."""
        # Orbax gives a checkpoint its final name when it is complete.
        return sorted(int(path.name) for path in self.directory.glob("*") if _is_step(path.name))

    @property
    def set_aside(self) -> list[Path]:
        """The damaged checkpoints that a writer has renamed."""
        return sorted(self.directory.glob("*.damaged*"))

    def restore(
        self, wanted: Callable[[dict[str, Any]], Arrays] | None = None, step: int | None = None
    ) -> Restored | None:
        """The newest checkpoint that is not damaged, or that of `step`; None if there is none.

        Every damaged one on the way is named in a printed line, and set aside by a writer.

        Args:
            wanted: called with the metadata of a checkpoint; returns the abstract arrays, with shardings, to load, or
                raises InputError if the checkpoint belongs to another run. By default, all arrays on one device.

        Raises:
            InputError: from `wanted`, or the checkpoint has other arrays, or that of `step` is missing or damaged.
        """
        if step is not None and self.steps:
            return self._restore_step(step, wanted)
        tried: set[int] = set()
        # Process 0 chooses: listings of a shared folder may differ for a while.
        while (newest := int(_first_text(str(max(set(self.steps) - tried, default=-1))))) >= 0:
            try:
                return self._read(newest, wanted)
            except _DamagedError as damage:
                self._pass_over(newest, str(damage))
            tried.add(newest)
        return None

    def _restore_step(self, step: int, wanted: Callable[[dict[str, Any]], Arrays] | None) -> Restored:
        if step not in self.steps:
            choice = ", ".join(map(str, self.steps))
            raise InputError(f"{self.directory}: no checkpoint of step {step}; expected one of {choice}")
        try:
            return self._read(step, wanted)
        except _DamagedError as damage:
            reason = str(damage)
        others = ", ".join(str(other) for other in self.steps if other != step and self._is_undamaged(other, wanted))
        raise InputError(f"{self.directory / str(step)}: damaged: {reason}; undamaged steps: {others or 'none'}")

    def _is_undamaged(self, step: int, wanted: Callable[[dict[str, Any]], Arrays] | None) -> bool:
        try:
            self._read(step, wanted)
        except _DamagedError:
            return False
        return True

    def _read(self, step: int, wanted: Callable[[dict[str, Any]], Arrays] | None) -> Restored:
        """The checkpoint of a step, verified. Raises _DamagedError on all processes if one of them finds damage."""
        place = self.directory / str(step)
        record = _on_all_processes(lambda: _read_record(place))
        described = record["arrays"]
        abstract = _on_one_device(described) if wanted is None else wanted(record["metadata"])
        _check_same(place, described, abstract)
        arrays = _on_all_processes(lambda: _read_arrays(place, abstract))
        for name, mark in fingerprints(arrays).items():
            if mark != described[name]["fingerprint"]:
                raise _DamagedError(f"the values of {name} are not those that were saved")
        return Restored(step, arrays, record["metadata"])

    def _pass_over(self, step: int, reason: str) -> None:
        """Say that a checkpoint is damaged; a writer also renames it, to a name that is no step."""
        place = self.directory / str(step)
        if self._keep is None:
            hosts.print_once(f"note: {place} is damaged and not used: {reason}")
            return
        if hosts.is_first():
            aside, number = place.with_name(f"{step}.damaged"), 1
            while aside.exists():
                number += 1
                aside = place.with_name(f"{step}.damaged-{number}")
            place.rename(aside)
            hosts.print_once(f"note: {place} is damaged and now named {aside.name}: {reason}")
        hosts.barrier(f"checkpoint {step} is set aside")

    def _writer(self) -> Any:
        """Orbax's manager of the folder. Opened by the first save, when the damaged checkpoints are set aside."""
        if self._orbax is None:
            context = ocp.Context()
            # If the folder cannot be made in the background, threads wait 20 minutes for it and keep the process alive.
            context.asynchronous.create_directories_asynchronously = False
            self._orbax = _training.Checkpointer(
                self.directory,
                context=context,
                # Who calls save means it; the default leaves out a step while the one before is still being written.
                save_decision_policy=_training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=_training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        return self._orbax

    def _raise_failed_write(self, error: Exception) -> NoReturn:
        failure = errors.failed_write(error)
        if failure is None:
            raise error
        last = f"step {self.steps[-1]}" if self.steps else "none"
        raise InputError(f"{self.directory}: writing failed: {failure}; last complete checkpoint: {last}") from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes, which an error may have left behind.
        if self._orbax is None or (kind is not None and hosts.is_distributed()):
            return
        try:
            self._orbax.close()
        except Exception as error:
            if kind is None:
                self._raise_failed_write(error)
            # The error that ends the block is the one to report.
            hosts.print_once(f"note: {self.directory}: the last save failed: {_one_line(error)}")


# --- Reading ---------------------------------------------------------------------------------------------------------


class _DamagedError(Exception):
    """A checkpoint is not as it was written; the message is the reason."""


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and name == str(int(name))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_record(place: Path) -> dict[str, Any]:
    """Step, description of the arrays and metadata of a checkpoint, verified."""
    if not place.is_dir():
        raise _DamagedError("it is not a folder")
    found = json.loads((place / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))["custom_metadata"]
    if found.keys() == {"arrays", "facts"}:
        raise InputError(f"{place}: written by version 0.1.0, without a checksum; expected one of a later version")
    if found.keys() != {"record", "sha256"} or _sha256(found["record"]) != found["sha256"]:
        raise _DamagedError("its metadata is not that which was saved")
    record = json.loads(found["record"])
    if record["step"] != int(place.name):
        raise _DamagedError(f"it is the checkpoint of step {record['step']}")
    return record


def _read_arrays(place: Path, abstract: Arrays) -> dict[str, Array]:
    """The arrays as Orbax stores them, read by TensorStore: each process reads what its devices need.

    Orbax itself waits for the other processes while it reads, and prints pages from its threads if a file is damaged.
    """
    base = {"driver": "file", "path": f"{place / 'state'}/"}
    stores = {
        name: tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}},
            open=True,
            read=True,
            dtype=array.dtype,
            shape=array.shape,
        )
        for name, array in abstract.items()
    }

    def read(name: str, index: Any) -> np.ndarray:
        return stores[name].result()[index].read().result()

    return {
        name: jax.make_array_from_callback(array.shape, array.sharding, partial(read, name))
        for name, array in abstract.items()
    }


def _on_one_device(described: dict[str, Any]) -> Arrays:
    where = replicated(one_device_mesh())
    return {
        name: jax.ShapeDtypeStruct(tuple(about["shape"]), about["dtype"], sharding=where)
        for name, about in described.items()
    }


def _check_same(place: Path, described: dict[str, Any], wanted: Arrays) -> None:
    """Raise InputError if a checkpoint does not have the arrays that are wanted."""
    for name in sorted(described.keys() ^ wanted.keys()):
        problem = "is missing" if name in wanted else "is not of this run"
        raise InputError(f"{place}: {name} {problem}; resume with the configuration that the run was started with")
    for name, array in wanted.items():
        have = (described[name]["shape"], described[name]["dtype"])
        want = (list(array.shape), str(array.dtype))
        if have != want:
            raise InputError(f"{place}: {name} is {have[1]}{have[0]}; this configuration needs {want[1]}{want[0]}")


def _on_all_processes(read: Callable[[], T]) -> T:
    """What `read` returns, if it succeeds on all processes; otherwise all raise the _DamagedError of one of them."""
    result, reason = None, ""
    try:
        result = read()
    except _DamagedError as damage:
        reason = str(damage)
    except Exception as error:  # damaged files make JSON and TensorStore raise exceptions of many types
        if isinstance(error, InputError) or _is_of_machine(error):
            raise
        reason = f"it cannot be read: {_one_line(error)}"
    if reason := _first_text(reason):
        raise _DamagedError(reason)
    return result  # pyright: ignore[reportReturnType]


def _is_of_machine(error: Exception) -> bool:
    """Whether an exception says nothing about the files: no memory, a device that failed, no permission."""
    texts = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")
    machine = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
    return isinstance(error, machine) or any(text in str(error) for text in texts)


def _one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")


def _first_text(text: str) -> str:
    """The text of the first process that has one; every process must call this."""
    if not hosts.is_distributed():
        return text
    row = np.zeros(512, np.uint8)
    data = text.encode()[: row.size]
    row[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, row.size)
    return next(filter(None, (bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows)), "")


# --- What Orbax logs -------------------------------------------------------------------------------------------------


def _log(record: logging.LogRecord) -> bool:
    """Whether to let a record of absl's logger through, which Orbax uses.

    Each thread of Orbax logs a failure with its traceback, and the failure is raised as well, except when an old
    checkpoint cannot be removed: that becomes one line.
    """
    if "orbax" not in Path(record.pathname).parts:
        return True
    if record.exc_info and record.module == "storage_backend":
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = None
        return True
    return record.levelno < logging.ERROR


logging.getLogger("absl").addFilter(_log)
