"""What a LoRA adds to the weights of a model, and whether it fits the model."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from einops import rearrange

from tfm_jax.errors import InputError
from tfm_jax.lora.files import Lora
from tfm_jax.wan.checks import expected_shapes, similar
from tfm_jax.wan.components import TRANSFORMER, abstract_parameters
from tfm_jax.wan.names import BlockLinear, Row, Shapes, transformer_rows
from tfm_jax.wan.sources import Change
from tfm_jax.wan.transformer import TransformerConfig


@functools.cache
def transformer_shapes(config: TransformerConfig) -> Shapes:
    """Map the original names of a transformer's tensors to their shapes in torch."""
    parameters = abstract_parameters(TRANSFORMER, config, np.float32)
    ours = {name: value.shape for name, value in parameters.items()}
    return expected_shapes("original", transformer_rows(config.layers), ours)


def check_fits(lora: Lora, config: TransformerConfig, place: str | Path | None = None) -> None:
    """Check that the adapters and differences of `lora` belong to a transformer of these sizes.

    Args:
        place: the file or field to name in the error message.

    Raises:
        InputError: a shape is wrong, the model lacks a layer, or a linear layer has an adapter in some blocks only.
    """
    try:
        _check_adapters(lora, config)
        _check_differences(lora, config)
    except InputError as error:
        raise InputError(f"{place}: {error}" if place else str(error)) from None


def _check_adapters(lora: Lora, config: TransformerConfig) -> None:
    shapes, layers = transformer_shapes(config), range(config.layers)
    in_blocks = {linear for linear in lora.adapters if isinstance(linear, BlockLinear)}
    expected = {BlockLinear(layer, linear.name) for layer in layers for linear in in_blocks}
    for linear in sorted(expected ^ in_blocks):
        problem = "has no adapter for" if linear in expected else "has an adapter for a layer that the model lacks:"
        raise InputError(f"LoRA {problem} {linear}; expected the same linear layers in each of {len(layers)} blocks")
    for linear, adapter in lora.adapters.items():
        features_out, features_in = shapes[f"{linear}.weight"]
        wanted = {"A": (adapter.a.shape, (lora.rank, features_in)), "B": (adapter.b.shape, (features_out, lora.rank))}
        for factor, (shape, want) in wanted.items():
            if shape != want:
                raise InputError(f"LoRA {factor} of {linear} is {list(shape)}; expected {list(want)}")


def _check_differences(lora: Lora, config: TransformerConfig) -> None:
    shapes = transformer_shapes(config)
    for name, difference in lora.differences.items():
        if name not in shapes:
            raise InputError(f"LoRA has a difference for {name}, which the model lacks{similar(name, shapes.keys())}")
        if difference.shape != shapes[name]:
            raise InputError(
                f"LoRA has a difference of shape {list(difference.shape)} for {name}; expected {list(shapes[name])}"
            )


def weight_change(lora: Lora) -> Change:
    """Return what `lora` adds to each tensor: the `change` of a `Source`."""
    adapters = {f"{linear}.weight": adapter for linear, adapter in lora.adapters.items()}
    magnitudes = {f"{linear}.weight": magnitude for linear, magnitude in lora.magnitudes.items()}

    def change(row: Row, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        total = lora.differences.get(row.original)
        if adapter := adapters.get(row.original):
            product = (adapter.b * np.float32(lora.scale)) @ adapter.a
            total = product if total is None else product + total
        if total is None:
            return None
        total = rearrange(total, row.axes)
        if row.original not in magnitudes:
            return total
        weight = read().astype(np.float32)
        changed = weight + total
        return changed * (magnitudes[row.original] / np.linalg.norm(changed, axis=0)) - weight

    return change
