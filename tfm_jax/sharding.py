"""Devices as a named mesh, and the one table that says which logical axis is split over which mesh axis."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from tfm_jax.errors import InputError

MESH_AXES = ("data", "fsdp")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "tokens": (),
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "heads": (),
    "mlp": (),
    "vocab": (),
    "rank": (),
}
"""Logical axis -> the mesh axes it is split over. Adding a way to split is a row here."""


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A `data x fsdp` mesh over all devices; `data=-1` takes what `fsdp` leaves.

    Raises:
        InputError: the product is not the number of devices.
    """
    devices = len(_devices())
    if fsdp < 1 or devices % fsdp:
        choices = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise InputError(f"mesh.fsdp={fsdp} does not divide {devices} devices; use one of {choices}")
    if data == -1:
        data = devices // fsdp
    if data * fsdp != devices:
        raise InputError(
            f"mesh.data={data} x mesh.fsdp={fsdp} is {data * fsdp}, but there are {devices} devices; "
            f"use mesh.data={devices // fsdp} or -1"
        )
    # Auto: the compiler derives every sharding from those of the arguments and of the constrained activations.
    return jax.make_mesh((data, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def one_device_mesh() -> Mesh:
    """The mesh of the first device alone."""
    return Mesh(np.array(_devices()[:1]).reshape(1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 2)


def _devices() -> list[Any]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is a default backend
        reason = " ".join(str(error).split()) or "no backend"
        raise InputError(
            f"JAX finds no device ({reason}); expected one: check JAX_PLATFORMS and the jax[cuda] or jax[tpu] set-up"
        ) from None


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises:
        ValueError: two of its axes would be split over the same mesh axis.
    """
    spec = [RULES[axis] if axis else () for axis in axes]
    used = [name for names in spec for name in names]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {spec}")
    return PartitionSpec(*(names or None for names in spec))


def shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of every variable of a module or state, from its logical axes; other leaves are replicated.

    Raises:
        InputError: an axis has a length that its mesh axes do not divide.
    """

    def one(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return replicated(mesh)
        axes, shape = variable.get_metadata()["axes"], variable.get_value().shape
        for axis, length in zip(axes, shape, strict=True):
            split = math.prod(mesh.shape[name] for name in (RULES[axis] if axis else ()))
            if length % split:
                raise InputError(f"mesh: {split} devices do not divide the {axis} axis of length {length}")
        return variable.replace(NamedSharding(mesh, partition_spec(axes)))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def per_device(function: Callable[..., Array], *arrays: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """`function` on each device's share of the batch, for kernels that the compiler cannot split by itself.

    Under `jax.set_mesh`; without a mesh, `function(*arrays)`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays)
    spec = partition_spec(("batch",))
    # Pallas calls do not say over which axes their results vary, so that JAX cannot check it.
    return jax.shard_map(function, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(*arrays)


def constrain(x: Shaped[Array, "..."], axes: tuple[str | None, ...]) -> Shaped[Array, "..."]:
    """Tell the compiler how an activation is split, under `jax.set_mesh`; without a mesh, `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
