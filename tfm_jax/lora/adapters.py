"""Adapters on the linear maps of the transformer: attach, start, split off, and name them as the public files do."""

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
from tfm_jax.lora.files import Adapter, Lora
from tfm_jax.sharding import one_device_mesh, shardings
from tfm_jax.wan.layers import Linear
from tfm_jax.wan.names import block_linears
from tfm_jax.wan.transformer import WanTransformer


class LoraSplit(NamedTuple):
    """A transformer in three: what it is, the adapters, everything else."""

    graph: nnx.GraphDef
    lora: nnx.State
    frozen: nnx.State


def target_linears(targets: tuple[str, ...]) -> dict[str, str]:
    """The linear maps of a block that `targets` name, as original name -> ours, in the order of the block.

    A target is the end of an original name: `q` is `self_attn.q` and `cross_attn.q`, `ffn.0` is itself.

    Raises:
        InputError: a target names none.
    """
    linears = {original: ours for ours, original, _ in block_linears()}
    found = set()
    for target in targets:
        matches = {name for name in linears if name == target or name.endswith(f".{target}")}
        if not matches:
            ends = dict.fromkeys(name.removeprefix("self_attn.").removeprefix("cross_attn.") for name in linears)
            raise InputError(f"lora.targets: {target!r} names no linear map; expected some of {', '.join(ends)}")
        found |= matches
    return {name: ours for name, ours in linears.items() if name in found}


def attach_lora(model: WanTransformer, config: LoraConfig) -> None:
    """Give every targeted linear map of `model` an adapter without values yet, A `[in, rank]`, B `[rank, out]`.

    Raises:
        InputError: an unknown target, or a rank above the narrowest map.
    """
    for original, ours in target_linears(config.targets).items():
        linear = _linear(model, ours)
        layers, features_in, features_out = linear.kernel.shape
        if config.rank > min(features_in, features_out):
            raise InputError(
                f"lora.rank={config.rank} is above the width of {original}, {min(features_in, features_out)}"
            )
        stack, axis_in, axis_out = linear.kernel.get_metadata()["axes"]
        linear.lora_a = nnx.LoRAParam(
            jax.ShapeDtypeStruct((layers, features_in, config.rank), jnp.float32), axes=(stack, axis_in, "rank")
        )
        linear.lora_b = nnx.LoRAParam(
            jax.ShapeDtypeStruct((layers, config.rank, features_out), jnp.float32), axes=(stack, "rank", axis_out)
        )
        linear.lora_scale = config.alpha / config.rank


def init_lora(model: WanTransformer, key: jax.Array, mesh: Mesh | None = None) -> None:
    """Start the attached adapters: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero."""
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
    """The adapters apart from all else; `nnx.merge(*split)` is the model again."""
    return LoraSplit(*nnx.split(model, nnx.LoRAParam, ...))


def to_files(arrays: Mapping[str, np.ndarray | Array], alpha: float) -> Lora:
    """Trained adapters as the files hold them: one pair per layer, torch's axes, original names.

    Args:
        arrays: stacked factors by path, `blocks/self_attn/q/lora_a/value` and so on.
    """
    adapters = {}
    for ours, original, _ in block_linears():
        paths = [f"blocks/{ours.replace('.', '/')}/lora_{factor}/value" for factor in "ab"]
        if paths[0] in arrays:
            for layer, (a, b) in enumerate(zip(*(np.asarray(arrays[path]) for path in paths), strict=True)):
                adapters[f"blocks.{layer}.{original}"] = Adapter(a.T, b.T)
    return Lora(adapters, next(iter(adapters.values())).a.shape[0], alpha)


def load_adapters(model: WanTransformer, lora: Lora, mesh: Mesh | None = None) -> None:
    """Attach the adapters of a file to `model`.

    Raises:
        InputError: they are not those of all layers of this model.
    """
    layers = model.config.layers
    linears = {original: ours for ours, original, _ in block_linears()}
    named = dict.fromkeys(name.split(".", 2)[2] for name in lora.adapters)
    wanted = {f"blocks.{n}.{name}" for n in range(layers) for name in named}
    for name in sorted(wanted ^ lora.adapters.keys()):
        problem = "has no adapter for" if name in wanted else "has an adapter for a layer that the model lacks:"
        raise InputError(f"LoRA {problem} {name}; expected the same maps in each of {layers} layers")
    attach_lora(model, LoraConfig(rank=lora.rank, alpha=lora.alpha, targets=tuple(named)))
    state = split_lora(model).lora
    for name in named:
        linear = _linear(model, linears[name])
        for factor in ("a", "b"):
            value = np.stack([getattr(lora.adapters[f"blocks.{n}.{name}"], factor).T for n in range(layers)])
            variable = getattr(linear, f"lora_{factor}")
            if value.shape != variable.shape:
                raise InputError(
                    f"LoRA {factor.upper()} of {name} is {list(value.shape[:0:-1])}; "
                    f"expected {list(variable.shape[:0:-1])}"
                )
            variable.set_value(jnp.asarray(value, jnp.float32))
    where = shardings(state, mesh or one_device_mesh())
    nnx.update(model, jax.device_put(split_lora(model).lora, where))


def _linear(model: WanTransformer, ours: str) -> Linear:
    return attrgetter(ours)(model.blocks)
