"""The device mesh, and the table of rules that maps logical axes to mesh axes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from tfm_jax.config import MeshConfig
from tfm_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    # parameters
    "layers": (),
    "embed": ("fsdp", "sequence"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": (),
    "rank": (),
}
"""Logical axis -> the mesh axes it is split over. To split another logical axis, name its mesh axes here."""

Axes = tuple[str | None, ...]

ASYNC_ALL_GATHER = (
    "xla_enable_async_all_gather", "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
)  # fmt: skip
"""Options of XLA for TPUs. With all of them, the matrix products before an all-gather's end hide it; by default, the
chip waits for many of the all-gathers of weights that are split over `fsdp`."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of a configuration over `devices`, by default all of them.

    Neighbours in the mesh are close on the network. Only `data` spans the slices of a multislice run, which are
    connected by the slower data-centre network. GPUs keep their order, host by host, so that the last axes stay within
    a host if they fit.

    Raises:
        InputError: the product of the axes is not the number of devices, or `data` is not a multiple of the number of
            slices.
    """
    devices = _devices() if devices is None else list(devices)
    sizes = _sizes(config, len(devices))
    slices = num_slices(devices)
    if sizes[0] % slices:
        raise InputError(
            f"mesh.data={sizes[0]}: the devices form {slices} slices, and only data spans slices; use a multiple of "
            f"{slices}, with fsdp x sequence x tensor a divisor of {len(devices) // slices}"
        )
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return _mesh(grid)


def num_slices(devices: Sequence[Any]) -> int:
    """Return the number of TPU slices that the devices belong to. Other devices count as one slice, although JAX gives
    each host of GPUs its own slice index."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform != "gpu"}) or 1


def one_device_mesh() -> Mesh:
    """Return a mesh of the first device of this process alone."""
    return batch_mesh(_devices(local=True)[:1])


def local_mesh() -> Mesh:
    """Return a mesh that splits batches over the devices of this process; each of them holds all parameters."""
    return batch_mesh(_devices(local=True))


def batch_mesh(devices: Sequence[Any]) -> Mesh:
    """Return a mesh that splits batches over `devices`; each of them holds all parameters."""
    return _mesh(np.array(devices).reshape(-1, 1, 1, 1))


def first_devices(mesh: Mesh) -> list[Any]:
    """Return the first device of each shard of a batch. The other devices of a shard work on the same rows."""
    return list(mesh.devices.reshape(num_shards("batch", mesh), -1)[:, 0])


def _mesh(devices: np.ndarray) -> Mesh:
    # Auto: the compiler derives all other shardings from those of the arguments and the constrained activations.
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Return the length of every mesh axis. If `data` is -1, it takes the devices that the other axes leave."""
    inner = {name: getattr(config, name) for name in MESH_AXES[1:]}
    remaining = devices
    for name, size in inner.items():
        if remaining % size:
            before = [
                f"mesh.{other}={inner[other]}" for other in MESH_AXES[1 : MESH_AXES.index(name)] if inner[other] > 1
            ]
            left = f" left after {' x '.join(before)}" if before else ""
            raise InputError(
                f"mesh.{name}={size} does not divide the {remaining} devices{left}; use one of {_divisors(remaining)}"
            )
        remaining //= size
    if config.data not in (-1, remaining):
        product = " x ".join(f"mesh.{name}={size}" for name, size in {"data": config.data, **inner}.items())
        raise InputError(
            f"{product} is {config.data * devices // remaining}, but there are {devices} devices; "
            f"use mesh.data={remaining} or -1"
        )
    return (remaining, *inner.values())


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Return the options with which XLA compiles a program for this mesh, as `jax.jit` takes them."""
    return dict.fromkeys(ASYNC_ALL_GATHER, True) if mesh.devices.flat[0].platform == "tpu" else {}


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raise InputError unless the batch can be split evenly over the mesh."""
    parts = num_shards("batch", mesh)
    if batch_size % parts:
        above = -(-batch_size // parts) * parts
        raise InputError(
            f"train.batch_size={batch_size}: expected a multiple of mesh.data={mesh.shape['data']} x mesh.fsdp="
            f"{mesh.shape['fsdp']}; use {above}, or smaller mesh.data or mesh.fsdp and larger mesh.sequence or "
            "mesh.tensor"
        )


def check_split(heads: int, tokens: int, mesh: Mesh | AbstractMesh | None = None) -> None:
    """Raise InputError unless heads and tokens can be split evenly over `mesh`, by default that of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    for axis, length, what in (("heads", heads, "heads of the model"), ("tokens", tokens, "tokens of a clip")):
        parts = num_shards(axis, mesh)
        if length % parts:
            (name,), choices = RULES[axis], _divisors(math.gcd(length, mesh.size))
            raise InputError(f"mesh.{name}={parts} does not divide the {length} {what}; use one of {choices}")


def _divisors(number: int) -> str:
    """List all divisors of a number for an error message."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _devices(local: bool = False) -> list[Any]:
    """Return the devices of all processes, or those of this process."""
    try:
        return jax.local_devices() if local else jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is a default backend
        reason = " ".join(str(error).split()) or "no backend"
        raise InputError(
            f"JAX finds no device ({reason}); expected at least one: check JAX_PLATFORMS and the installation of "
            "jax[cuda] or jax[tpu]"
        ) from None


def partition_spec(axes: Axes) -> PartitionSpec:
    """Return the partition spec of an array with these logical axes.

    Raises:
        ValueError: two of the axes would be split over the same mesh axis.
    """
    spec = [RULES[axis] if axis else () for axis in axes]
    used = [name for names in spec for name in names]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {spec}")
    return PartitionSpec(*(names or None for names in spec))


def num_shards(axis: str | None, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Return how many parts a logical axis is split into on `mesh`, by default that of `jax.set_mesh`.

    Without a mesh, there is one part.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty or axis is None:
        return 1
    return math.prod(mesh.shape[name] for name in RULES[axis])


def shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the sharding of every leaf of a module or state. Variables are split according to their logical axes, and
    other leaves are replicated.

    Raises:
        InputError: the sizes of the mesh axes do not divide the length of an axis that is split over them.
    """

    def sharding_of(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return replicated(mesh)
        axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
        for axis, length in zip(axes, shape, strict=True):
            if length % num_shards(axis, mesh):
                names = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in RULES[axis] if mesh.shape[name] > 1)
                raise InputError(
                    f"{names} does not divide the {axis} axis of length {length} of a parameter; "
                    f"use a divisor of {length}"
                )
        return variable.replace(NamedSharding(mesh, partition_spec(axes)))

    return jax.tree.map(sharding_of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of arrays of which every device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(rows: Shaped[np.ndarray, "b ..."], mesh: Mesh) -> Shaped[Array, "b ..."]:
    """Put the rows of a batch on their devices. Every process has all rows, and uses those of its own devices."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), rows.__getitem__)


def fetch(x: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """Return all values of an array, in every process whose devices hold a part of it. All of these call this."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def per_device(function: Callable[..., Any], arrays: Sequence[Any], axes: Sequence[Axes]) -> Any:
    """Run `function` on each device's part of `arrays`, which are split by their logical `axes`.

    Each of `arrays` may be a tree of arrays that are all split in the same way. The result is split like the first one.
    This is for kernels that the compiler cannot partition, and for communication that it would not choose. The mesh is
    that of `jax.set_mesh`; without one, return `function(*arrays)`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays)
    specs = tuple(partition_spec(names) for names in axes)
    # check_vma=False: Pallas calls do not declare over which mesh axes their results vary, so JAX cannot check it.
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def constrain(x: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "..."]:
    """Constrain how an activation is split over the mesh of `jax.set_mesh`. Without a mesh, return `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def gather(x: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "..."]:
    """Gather a parameter along the mesh axes that split the batch or the tokens; along others it stays split.

    Without this, the compiler may choose to move the activations instead, which are larger.
    """
    gathered = {*RULES["batch"], *RULES["tokens"]}
    return constrain(x, tuple(None if axis and gathered & set(RULES[axis]) else axis for axis in axes))
