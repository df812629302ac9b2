"""How similar the changes of two LoRAs are, for each linear layer."""

import math
from typing import NamedTuple

from tfm_jax.errors import InputError
from tfm_jax.lora.files import Lora
from tfm_jax.lora.inspecting import product
from tfm_jax.wan.names import TransformerLinear


class Similarity(NamedTuple):
    """The changes of two LoRAs compared, of one linear layer or of several as one vector."""

    cosine: float
    """Cosine of the angle between the changes; NaN if one of them is zero."""
    ratio: float
    """Norm of the second change, relative to that of the first; NaN if the first is zero."""


def compare(first: Lora, second: Lora) -> tuple[dict[TransformerLinear, Similarity], Similarity]:
    """Compare the linear layers for which both LoRAs have an adapter: one by one, and all together.

    Raises:
        InputError: there is no such linear layer, or the LoRAs are for models of different widths.
    """
    both = [linear for linear in first.adapters if linear in second.adapters]
    if not both:
        raise InputError("the two LoRAs have adapters on different linear layers; expected at least one in both")
    products = {linear: _products(first, second, linear) for linear in both}
    sums = [math.fsum(column) for column in zip(*products.values(), strict=True)]
    return {linear: _similarity(*values) for linear, values in products.items()}, _similarity(*sums)


def _products(first: Lora, second: Lora, linear: TransformerLinear) -> tuple[float, float, float]:
    """Return the inner products of the first change with itself, of the two, and of the second with itself."""
    one, other = first.adapters[linear], second.adapters[linear]
    if (one.a.shape[1], len(one.b)) != (other.a.shape[1], len(other.b)):
        raise InputError(
            f"{linear}: the widths are {one.a.shape[1]} and {len(one.b)} in one LoRA, but {other.a.shape[1]} and "
            f"{len(other.b)} in the other; expected LoRAs for the same model"
        )
    return (
        first.scale**2 * product(one, one),
        first.scale * second.scale * product(one, other),
        second.scale**2 * product(other, other),
    )


def _similarity(one: float, both: float, other: float) -> Similarity:
    cosine = both / math.sqrt(one * other) if one > 0 and other > 0 else math.nan
    return Similarity(cosine, math.sqrt(other / one) if one > 0 else math.nan)
