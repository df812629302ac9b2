"""Attach, initialise and split off the LoRA adapters of the transformer, and convert them to and from `Lora`."""

from collections.abc import Mapping
from operator import attrgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from tfm_jax.config import LoraConfig
from tfm_jax.errors import InputError
from tfm_jax.lora.applying import check_fits
from tfm_jax.lora.files import Adapter, Lora
from tfm_jax.sharding import one_device_mesh, shardings
from tfm_jax.wan.layers import Linear
from tfm_jax.wan.names import BLOCK_LINEARS, LORA_TARGETS, BlockLinear, network_order
from tfm_jax.wan.transformer import WanTransformer


class LoraSplit(NamedTuple):
    """A transformer split into its structure, its adapters and all other parameters."""

    graph: nnx.GraphDef
    lora: nnx.State
    frozen: nnx.State


def target_linears(targets: tuple[str, ...]) -> list[str]:
    """Return the original names of the linear layers that `targets` select, in the order of `BLOCK_LINEARS`.

    A target is an original name or the end of one: `q` selects `self_attn.q` and `cross_attn.q`.

    Raises:
        InputError: a target selects no layer.
    """
    found = set()
    for target in targets:
        matches = {name for name in BLOCK_LINEARS if name == target or name.endswith(f".{target}")}
        if not matches:
            raise InputError(
                f"lora.targets: {target!r} names no linear layer; expected some of {', '.join(LORA_TARGETS)}"
            )
        found |= matches
    return [name for name in BLOCK_LINEARS if name in found]


def attach_lora(model: WanTransformer, config: LoraConfig) -> None:
    """Give the targeted linear layers of `model` abstract adapters (only shapes): A `[in, rank]` and B `[rank, out]`.

    Raises:
        InputError: a target is unknown, or the rank exceeds the input or output width of a targeted layer.
    """
    for name in target_linears(config.targets):
        linear = _linear(model, name)
        _, features_in, features_out = linear.kernel.shape
        if config.rank > min(features_in, features_out):
            width = min(features_in, features_out)
            raise InputError(f"lora.rank={config.rank}: expected at most {width}, the width of {name}")
        _attach(linear, config.rank, config.alpha)


def _attach(linear: Linear, rank: int, alpha: float) -> None:
    *stack, features_in, features_out = linear.kernel.shape
    *layers, axis_in, axis_out = linear.kernel.get_metadata()["axes"]
    linear.lora_a = nnx.LoRAParam(
        jax.ShapeDtypeStruct((*stack, features_in, rank), jnp.float32), axes=(*layers, axis_in, "rank")
    )
    linear.lora_b = nnx.LoRAParam(
        jax.ShapeDtypeStruct((*stack, rank, features_out), jnp.float32), axes=(*layers, "rank", axis_out)
    )
    linear.lora_scale = alpha / rank


def init_lora(model: WanTransformer, key: jax.Array, mesh: Mesh | None = None) -> None:
    """Initialise the attached adapters: A is uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)), B is zero."""
    lora = split_lora(model).lora

    def init(key: jax.Array) -> nnx.State:
        values = []
        for number, (path, variable) in enumerate(nnx.to_flat_state(lora)):
            _, features_in, _ = variable.shape
            if path[-1] == "lora_a":
                bound = features_in**-0.5
                part = jax.random.fold_in(key, number)
                value = jax.random.uniform(part, variable.shape, jnp.float32, -bound, bound)
            else:
                value = jnp.zeros(variable.shape, jnp.float32)
            values.append((path, variable.replace(value)))
        return nnx.from_flat_state(values)

    nnx.update(model, jax.jit(init, out_shardings=shardings(lora, mesh or one_device_mesh()))(key))


def split_lora(model: WanTransformer) -> LoraSplit:
    """Separate the adapters from everything else. `nnx.merge(*split)` restores the model."""
    return LoraSplit(*nnx.split(model, nnx.LoRAParam, ...))


def lora_from_checkpoint(arrays: Mapping[str, np.ndarray | Array], alpha: float) -> Lora:
    """Convert trained adapters to a `Lora`, which has one pair of factors per linear layer, in torch's layout.

    Args:
        arrays: factors stacked over the blocks, by paths such as `blocks/self_attn/q/lora_a/value`.
    """
    adapters = {}
    for name, names in BLOCK_LINEARS.items():
        paths = [f"blocks/{names.ours.replace('.', '/')}/lora_{factor}/value" for factor in "ab"]
        if paths[0] in arrays:
            for layer, (a, b) in enumerate(zip(*(np.asarray(arrays[path]) for path in paths), strict=True)):
                adapters[BlockLinear(layer, name)] = Adapter(a.T, b.T)
    return Lora(adapters, next(iter(adapters.values())).a.shape[0], alpha)


def load_adapters(model: WanTransformer, lora: Lora, mesh: Mesh | None = None) -> None:
    """Attach the adapters of a LoRA file to `model`. Its differences are not applied: see `load_base`.

    Raises:
        InputError: the adapters do not match the linear layers of this model.
    """
    check_fits(lora, model.config)
    stacks: dict[str, list[Adapter]] = {}
    for linear in sorted(lora.adapters, key=network_order):
        stacks.setdefault(linear.ours, []).append(lora.adapters[linear])
    for path, adapters in stacks.items():
        linear = attrgetter(path)(model)
        _attach(linear, lora.rank, lora.alpha)
        for factor in ("a", "b"):
            variable = getattr(linear, f"lora_{factor}")
            value = np.stack([getattr(adapter, factor).T for adapter in adapters])
            variable.set_value(jnp.asarray(value.reshape(variable.shape), jnp.float32))
    state = split_lora(model).lora
    nnx.update(model, jax.device_put(state, shardings(state, mesh or one_device_mesh())))


def _linear(model: WanTransformer, name: str) -> Linear:
    """Return the stacked linear layer of `model` with this original name."""
    return attrgetter(BLOCK_LINEARS[name].ours)(model.blocks)
