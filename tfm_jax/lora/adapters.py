"""Attach, initialise and split off the LoRA adapters of the transformer, and convert them to and from `Lora`."""

import math
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from tfm_jax.config import LoraConfig
from tfm_jax.config.reading import shown
from tfm_jax.errors import InputError
from tfm_jax.lora.applying import check_fits
from tfm_jax.lora.files import Adapter, Lora, uniform
from tfm_jax.lora.keys import network_order
from tfm_jax.sharding import one_device_mesh, shardings
from tfm_jax.wan.layers import Linear, column_norms
from tfm_jax.wan.names import BLOCK_LINEARS, LORA_TARGETS, BlockLinear, TransformerLinear
from tfm_jax.wan.transformer import WanTransformer


class LoraSplit(NamedTuple):
    """A transformer split into its structure, its adapters and all other parameters."""

    graph: nnx.GraphDef
    lora: nnx.State
    frozen: nnx.State


class Size(NamedTuple):
    """The rank of an adapter and its alpha: its output is scaled by alpha / rank."""

    rank: int
    alpha: float


def target_linears(targets: Iterable[str], field: str = "lora.targets") -> list[str]:
    """Return the original names of the linear layers that `targets` select, in the order of `BLOCK_LINEARS`.

    A target is an original name or the end of one: `q` selects `self_attn.q` and `cross_attn.q`.

    Args:
        field: field of the configuration that contains the targets, for error messages.

    Raises:
        InputError: a target selects no layer.
    """
    found = set()
    for target in targets:
        matches = {name for name in BLOCK_LINEARS if name == target or name.endswith(f".{target}")}
        if not matches:
            raise InputError(f"{field}: {target!r} names no linear layer; expected some of {', '.join(LORA_TARGETS)}")
        found |= matches
    return [name for name in BLOCK_LINEARS if name in found]


def adapter_sizes(config: LoraConfig) -> dict[str, Size]:
    """Map the original names of the linear layers with an adapter, in the order of `BLOCK_LINEARS`, to its size.

    Raises:
        InputError: a target or a key of `ranks` selects no layer, a key selects none with an adapter, or two keys
            select the same layer.
    """
    ranks = dict.fromkeys(target_linears(config.targets), config.rank)
    chosen: dict[str, str] = {}
    for key, rank in config.ranks.items():
        names = [name for name in target_linears([key], "lora.ranks") if name in ranks]
        if not names:
            raise InputError(
                f"lora.ranks: lora.targets={shown(config.targets)} does not select {key}; expected it there"
            )
        for name in names:
            if name in chosen:
                raise InputError(f"lora.ranks: {chosen[name]} and {key} both select {name}; expected only one of them")
            chosen[name], ranks[name] = key, rank
    return {name: Size(rank, config.alpha * (math.sqrt(rank) if config.rslora else 1)) for name, rank in ranks.items()}


def attach_lora(model: WanTransformer, config: LoraConfig) -> None:
    """Give the targeted linear layers of `model` abstract adapters (only shapes): A `[in, rank]` and B `[rank, out]`,
    and for a DoRA the magnitudes `[out]`.

    Raises:
        InputError: a target is unknown, or a rank exceeds the input or output width of a targeted layer.
    """
    for name, size in adapter_sizes(config).items():
        linear = _linear(model, name)
        _, features_in, features_out = linear.kernel.shape
        if size.rank > min(features_in, features_out):
            width = min(features_in, features_out)
            field = f"lora.rank={size.rank}" if size.rank == config.rank else f"lora.ranks={shown(config.ranks)}"
            raise InputError(f"{field}: expected at most {width}, the width of {name}")
        _attach(linear, size.rank, size.alpha, config.dora)


def _attach(linear: Linear, rank: int, alpha: float, dora: bool) -> None:
    *stack, features_in, features_out = linear.kernel.shape
    *layers, axis_in, axis_out = linear.kernel.get_metadata()["axes"]
    linear.lora_a = nnx.LoRAParam(
        jax.ShapeDtypeStruct((*stack, features_in, rank), jnp.float32), axes=(*layers, axis_in, "rank")
    )
    linear.lora_b = nnx.LoRAParam(
        jax.ShapeDtypeStruct((*stack, rank, features_out), jnp.float32), axes=(*layers, "rank", axis_out)
    )
    linear.lora_scale = alpha / rank
    if dora:
        linear.lora_magnitude = nnx.LoRAParam(
            jax.ShapeDtypeStruct((*stack, features_out), jnp.float32), axes=(*layers, axis_out)
        )


def init_lora(model: WanTransformer, key: jax.Array, mesh: Mesh | None = None) -> None:
    """Initialise the attached adapters: A is uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)), B is zero, and the
    magnitudes of a DoRA are the norms of the weights, so that new adapters change nothing."""
    lora = split_lora(model).lora

    def init(key: jax.Array) -> nnx.State:
        values = []
        for number, (path, variable) in enumerate(nnx.to_flat_state(lora)):
            if path[-1] == "lora_a":
                bound = variable.shape[1] ** -0.5
                part = jax.random.fold_in(key, number)
                value = jax.random.uniform(part, variable.shape, jnp.float32, -bound, bound)
            else:
                value = jnp.zeros(variable.shape, jnp.float32)
            values.append((path, variable.replace(value)))
        return nnx.from_flat_state(values)

    nnx.update(model, jax.jit(init, out_shardings=shardings(lora, mesh or one_device_mesh()))(key))
    _init_magnitudes(model)


def _init_magnitudes(model: WanTransformer) -> None:
    """Set the magnitudes of a DoRA to the norms of the weights of the base. Their arrays are already sharded."""
    for name in BLOCK_LINEARS:
        linear = _linear(model, name)
        if linear.lora_magnitude is not None:
            norms = jax.jit(column_norms, out_shardings=linear.lora_magnitude[...].sharding)
            scale = None if linear.kernel_scale is None else linear.kernel_scale[...]
            linear.lora_magnitude.set_value(norms(linear.kernel[...], scale))


def split_lora(model: WanTransformer) -> LoraSplit:
    """Separate the adapters from everything else. `nnx.merge(*split)` restores the model."""
    return LoraSplit(*nnx.split(model, nnx.LoRAParam, ...))


def without_lora(model: WanTransformer) -> WanTransformer:
    """Return the base model, as `model` with adapters that change nothing, so that it runs the same programs."""
    graph, lora, frozen = split_lora(model)
    base = nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), lora), frozen)
    _init_magnitudes(base)
    return base


def lora_from_checkpoint(arrays: Mapping[str, np.ndarray | Array], config: LoraConfig) -> Lora:
    """Convert trained adapters to a `Lora`, which has one pair of factors per linear layer, in torch's layout.

    Args:
        arrays: factors stacked over the blocks, by paths such as `blocks/self_attn/q/lora_a/value`.
        config: the configuration that they were trained with.
    """
    adapters: dict[TransformerLinear, Adapter] = {}
    alphas: dict[TransformerLinear, float] = {}
    magnitudes: dict[TransformerLinear, np.ndarray] = {}
    for name, size in adapter_sizes(config).items():
        place = f"blocks/{BLOCK_LINEARS[name].ours.replace('.', '/')}"
        paths = [f"{place}/lora_{factor}/value" for factor in "ab"]
        if paths[0] in arrays:
            for layer, (a, b) in enumerate(zip(*(np.asarray(arrays[path]) for path in paths), strict=True)):
                adapters[BlockLinear(layer, name)] = Adapter(a.T, b.T)
                alphas[BlockLinear(layer, name)] = size.alpha
        if config.dora:
            for layer, magnitude in enumerate(np.asarray(arrays[f"{place}/lora_magnitude/value"])):
                magnitudes[BlockLinear(layer, name)] = magnitude
    return uniform(adapters, alphas)._replace(magnitudes=magnitudes)


def check_lora(lora: Lora, config: LoraConfig) -> None:
    """Raise InputError unless `lora` has the adapters that `config` describes, and nothing else."""
    if lora.differences:
        what = f"a difference of a whole tensor, {next(iter(lora.differences))}"
        raise InputError(f"the LoRA has {what}; expected only adapters, because only these are trained")
    if bool(lora.magnitudes) != config.dora:
        kind = "is a DoRA" if lora.magnitudes else "is no DoRA"
        raise InputError(f"the LoRA {kind}; expected lora.dora={shown(bool(lora.magnitudes))}")
    sizes = adapter_sizes(config)
    found = {linear.name for linear in lora.adapters}
    if found != sizes.keys():
        names = ", ".join(sorted(found))
        raise InputError(f"the LoRA has adapters on {names}; lora.targets selects {', '.join(sorted(sizes))}")
    for name, size in sizes.items():
        if lora.rank != size.rank:
            raise InputError(f"the LoRA has rank {lora.rank}; the configuration gives {name} rank {size.rank}")
        if not math.isclose(lora.alpha, size.alpha, rel_tol=1e-6):
            scale = f"alpha / rank = {lora.alpha:g} / {lora.rank}"
            raise InputError(f"the LoRA has the scale {scale}; the configuration gives {size.alpha:g} / {size.rank}")


def load_adapters(model: WanTransformer, lora: Lora, mesh: Mesh | None = None) -> None:
    """Attach the adapters of a LoRA file to `model`. Its differences are not applied: see `load_base`.

    Raises:
        InputError: the adapters do not match the linear layers of this model.
    """
    check_fits(lora, model.config)
    stacks: dict[str, list[TransformerLinear]] = {}
    for name in sorted(lora.adapters, key=network_order):
        stacks.setdefault(name.ours, []).append(name)
    for path, names in stacks.items():
        linear = attrgetter(path)(model)
        _attach(linear, lora.rank, lora.alpha, bool(lora.magnitudes))
        values = {factor: [getattr(lora.adapters[name], factor).T for name in names] for factor in ("a", "b")}
        if lora.magnitudes:
            values["magnitude"] = [lora.magnitudes[name] for name in names]
        for part, value in values.items():
            variable = getattr(linear, f"lora_{part}")
            variable.set_value(jnp.asarray(np.stack(value).reshape(variable.shape), jnp.float32))
    state = split_lora(model).lora
    nnx.update(model, jax.device_put(state, shardings(state, mesh or one_device_mesh())))


def _linear(model: WanTransformer, name: str) -> Linear:
    """Return the stacked linear layer of `model` with this original name."""
    return attrgetter(BLOCK_LINEARS[name].ours)(model.blocks)
