"""Devices as a named mesh, and the one table that says which logical axis is split over which mesh axis."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
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
"""Logical axis -> the mesh axes it is split over. Adding a way to split is a row here."""

Axes = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a configuration names, over all devices or those given, neighbours in it being near on the network.

    Several slices of a TPU pod, which only a data-centre network joins, are split along `data` alone. GPUs lie in their
    own order, host by host: the last axes are within a host.

    Raises:
        InputError: the product is not the number of devices, or `data` is not a multiple of the slices.
    """
    devices = _devices() if devices is None else list(devices)
    sizes = _sizes(config, len(devices))
    slices = slices_of(devices)
    if sizes[0] % slices:
        raise InputError(
            f"mesh.data={sizes[0]}: the devices are {slices} slices, and only data spans slices; use a multiple of "
            f"{slices}, with fsdp x sequence x tensor a divisor of {len(devices) // slices}"
        )
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return _mesh(grid)


def slices_of(devices: Sequence[Any]) -> int:
    """How many slices of a TPU pod the devices are. To JAX every host of GPUs is a slice too, but not to us."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform != "gpu"}) or 1


def one_device_mesh() -> Mesh:
    """The mesh of the first device alone."""
    return _mesh(np.array(_devices()[:1]).reshape(1, 1, 1, 1))


def _mesh(devices: np.ndarray) -> Mesh:
    # Auto: the compiler derives every sharding from those of the arguments and of the constrained activations.
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Length of every mesh axis, `data` worked out from the others where it is -1."""
    inner = {name: getattr(config, name) for name in MESH_AXES[1:]}
    left = devices
    for name, size in inner.items():
        if left % size:
            before = [
                f"mesh.{other}={inner[other]}" for other in MESH_AXES[1 : MESH_AXES.index(name)] if inner[other] > 1
            ]
            of = f" that {' x '.join(before)} leaves" if before else ""
            raise InputError(f"mesh.{name}={size} does not divide the {left} devices{of}; use one of {divisors(left)}")
        left //= size
    if config.data not in (-1, left):
        product = " x ".join(f"mesh.{name}={size}" for name, size in {"data": config.data, **inner}.items())
        raise InputError(
            f"{product} is {config.data * devices // left}, but there are {devices} devices; use mesh.data={left} or -1"
        )
    return (left, *inner.values())


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raise InputError unless every part of the mesh that shares the batch gets the same number of clips."""
    parts = num_shards("batch", mesh)
    if batch_size % parts:
        above = -(-batch_size // parts) * parts
        raise InputError(
            f"train.batch_size={batch_size}: expected a multiple of mesh.data={mesh.shape['data']} x mesh.fsdp="
            f"{mesh.shape['fsdp']}; use {above}, or split less by data and fsdp and more by sequence or tensor"
        )


def check_split(heads: int, tokens: int, mesh: Mesh | AbstractMesh | None = None) -> None:
    """Raise InputError unless a mesh, by default that of `jax.set_mesh`, can split that many heads and tokens."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    for axis, length, what in (("heads", heads, "heads of the model"), ("tokens", tokens, "tokens of a clip")):
        parts = num_shards(axis, mesh)
        if length % parts:
            (name,), choices = RULES[axis], divisors(math.gcd(length, mesh.size))
            raise InputError(f"mesh.{name}={parts} does not divide the {length} {what}; use one of {choices}")


def divisors(number: int) -> str:
    """All of them, as errors list the values that would do."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _devices() -> list[Any]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is a default backend
        reason = " ".join(str(error).split()) or "no backend"
        raise InputError(
            f"JAX finds no device ({reason}); expected one: check JAX_PLATFORMS and the jax[cuda] or jax[tpu] set-up"
        ) from None


def partition_spec(axes: Axes) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises:
        ValueError: two of its axes would be split over the same mesh axis.
    """
    spec = [RULES[axis] if axis else () for axis in axes]
    used = [name for names in spec for name in names]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {spec}")
    return PartitionSpec(*(names or None for names in spec))


def num_shards(axis: str | None, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Into how many parts a logical axis is split on a mesh, by default that of `jax.set_mesh`; without one, 1."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty or axis is None:
        return 1
    return math.prod(mesh.shape[name] for name in RULES[axis])


def shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every variable of a module or state, from its logical axes; other leaves are replicated.

    Raises:
        InputError: an axis has a length that its mesh axes do not divide.
    """

    def one(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return replicated(mesh)
        axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
        for axis, length in zip(axes, shape, strict=True):
            if length % num_shards(axis, mesh):
                names = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in RULES[axis] if mesh.shape[name] > 1)
                raise InputError(
                    f"{names} does not divide the {axis} axis of length {length} of a parameter; use a divisor of it"
                )
        return variable.replace(NamedSharding(mesh, partition_spec(axes)))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def per_device(
    function: Callable[..., Array], arrays: Sequence[Shaped[Array, "..."]], axes: Sequence[Axes]
) -> Shaped[Array, "..."]:
    """`function` of each device's part of `arrays`, split as their logical `axes` say; its result as the first.

    For kernels that the compiler cannot split by itself, and for communication that it would not find. Under
    `jax.set_mesh`; without a mesh, `function(*arrays)`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays)
    specs = tuple(partition_spec(names) for names in axes)
    # Pallas calls do not say over which axes their results vary, so that JAX cannot check it.
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def constrain(x: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "..."]:
    """Tell the compiler how an activation is split, under `jax.set_mesh`; without a mesh, `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def gather(x: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "..."]:
    """A parameter as computation needs it: whole along the mesh axes that split batch or tokens, else left as it lies.

    Left to itself the compiler may move the activations instead, which are larger.
    """
    whole = {*RULES["batch"], *RULES["tokens"]}
    return constrain(x, tuple(None if axis and whole & set(RULES[axis]) else axis for axis in axes))
