"""Training checkpoints: arrays with a fingerprint each, checked before and after they are read.

Orbax (only this file imports it) writes and reads the arrays, asynchronously and sharded. What it does not notice is
noticed here: a state of another shape, and data that changed on the disk.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32
from orbax.checkpoint import v1 as ocp

from tfm_jax import hosts
from tfm_jax.errors import InputError

_training: Any = ocp.training  # its annotations do not take what its documentation passes

Arrays = dict[str, Any]
"""Name -> array, or its abstract value with a sharding."""


def flatten(tree: Any) -> Arrays:
    """The leaves of any tree by the path to them."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(tree: Any, arrays: Arrays) -> Any:
    """`tree` with its leaves replaced by `arrays`, as `flatten` names them."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


@jax.jit
def fingerprint(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """A checksum of the bits of an array: a sum modulo 2^32, so that it comes out the same however `x` is split.

    Every bit pattern counts an odd multiple that depends on its place; one changed element always changes the sum.
    """
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def fingerprints(arrays: Mapping[str, Array]) -> dict[str, int]:
    """The checksum of every array, by name."""
    marks = {name: fingerprint(array) for name, array in arrays.items()}
    return {name: int(mark) for name, mark in marks.items()}


class Checkpoints:
    """The checkpoints of one run, newest last. Use as a context manager: leaving it waits for the last save.

    Who writes them gives `keep`, the number of newest ones that stay, and removes what a killed run left unfinished.
    """

    def __init__(self, directory: Path, keep: int | None = None):
        self.directory = directory.absolute()
        self._orbax = _training.Checkpointer(
            self.directory,
            # Who calls save means it; the default leaves out a step while the one before is still being written.
            save_decision_policy=_training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None,  # what looks unfinished to a reader may be at work
        )

    def save(self, step: int, arrays: Arrays, facts: dict[str, Any]) -> None:
        """Save `arrays` and JSON `facts` as the checkpoint after `step` steps, in the background."""
        marks = fingerprints(arrays)
        kept = {
            name: {"shape": list(array.shape), "dtype": str(array.dtype), "fingerprint": marks[name]}
            for name, array in arrays.items()
        }
        self._orbax.save_async(step, arrays, custom_metadata={"arrays": kept, "facts": facts})

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def facts(self, step: int) -> dict[str, Any]:
        """The facts that were saved with a checkpoint."""
        return self._metadata(step)["facts"]

    def abstract(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of what a checkpoint holds."""
        kept = self._metadata(step)["arrays"]
        return {name: jax.ShapeDtypeStruct(tuple(about["shape"]), about["dtype"]) for name, about in kept.items()}

    def load(self, step: int, wanted: Arrays) -> dict[str, Array]:
        """The arrays of a checkpoint, placed as the shardings of `wanted` say.

        Raises:
            InputError: the checkpoint holds other arrays, or their data is damaged.
        """
        place = self.directory / str(step)
        kept = self._metadata(step)["arrays"]
        for name in sorted(kept.keys() ^ wanted.keys()):
            problem = "is missing" if name in wanted else "is not of this run"
            raise InputError(f"{place}: {name} {problem}; resume with the configuration that the run was started with")
        for name, array in wanted.items():
            have, want = (kept[name]["shape"], kept[name]["dtype"]), (list(array.shape), str(array.dtype))
            if have != want:
                raise InputError(f"{place}: {name} is {have[1]}{have[0]}; this configuration needs {want[1]}{want[0]}")
        arrays = self._orbax.load(step, wanted)
        for name, mark in fingerprints(arrays).items():
            if mark != kept[name]["fingerprint"]:
                raise InputError(f"{place}: {name} is damaged; delete this directory to resume from an earlier one")
        return arrays

    def _metadata(self, step: int) -> dict[str, Any]:
        return self._orbax.checkpointables_metadata(step).custom_metadata

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes, which an error may have left behind.
        if kind is None or not hosts.several():
            self._orbax.close()
