"""Infer the sizes of the networks from the shapes of their tensors, for files that have no config.json."""

import re
from collections.abc import Callable
from typing import Any

from tfm_jax.errors import InputError
from tfm_jax.wan.names import TEXT_ENCODER_ALIASES, Shapes, text_encoder_rows
from tfm_jax.wan.tensors import Shape

HEAD_DIM = 128
"""Width of the attention heads in every Wan2.1 model."""

_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.")


def transformer_sizes(shapes: Shapes) -> dict[str, Any]:
    """Infer the sizes of a transformer from the shapes of its tensors, with original names.

    The result lacks `eps`, which does not affect any shape, and `heads` unless the heads can have Wan2.1's width.

    Raises:
        InputError: the tensors are not those of a transformer.
    """

    def lengths(name: str, axes: int) -> Shape:
        if len(shape := shapes.get(name, ())) != axes:
            raise InputError(f"{name} has shape {list(shape)}; expected {axes} axes, as in a WanModel")
        return shape

    dim, channels, *_ = lengths("patch_embedding.weight", 5)
    blocks = [int(match[1]) for name in shapes if (match := _BLOCK.match(name))]
    return {
        "dim": dim,
        "ffn_dim": lengths("blocks.0.ffn.0.weight", 2)[0],
        "layers": max(blocks, default=0) + 1,
        "text_dim": lengths("text_embedding.0.weight", 2)[1],
        "freq_dim": lengths("time_embedding.0.weight", 2)[1],
        "channels": channels,
        **({} if dim % HEAD_DIM else {"heads": dim // HEAD_DIM}),
    }


def vae_sizes(shapes: Shapes) -> dict[str, Any]:
    """Infer the sizes of an autoencoder from the shapes of its tensors, because the original layout has no config.json.

    Raises:
        InputError: the tensors are not those of a Wan2.1 autoencoder.
    """

    def width(name: str) -> int:
        if not shapes.get(name):
            raise InputError(f"autoencoder has no tensor {name}; expected the original layout of Wan2.1_VAE.pth")
        return shapes[name][0]

    z_dim, base_dim = width("conv2.weight"), width("encoder.conv1.weight")
    levels: list[list[int]] = [[]]
    temporal: list[bool] = []
    stages = {name.split(".")[2] for name in shapes if name.startswith("encoder.downsamples.")}
    for i in range(len(stages)):
        if f"encoder.downsamples.{i}.resample.1.weight" in shapes:
            temporal.append(f"encoder.downsamples.{i}.time_conv.weight" in shapes)
            levels.append([])
        else:
            levels[-1].append(width(f"encoder.downsamples.{i}.residual.6.weight"))
    expected = [[level[0]] * len(levels[0]) for level in levels if level and base_dim and level[0] % base_dim == 0]
    if levels != expected:
        raise InputError(
            f"encoder.downsamples has block widths {levels}; expected every level to have equally many "
            f"blocks and a single block width, a multiple of {base_dim}"
        )
    return {
        "base_dim": base_dim,
        "z_dim": z_dim,
        "dim_mult": tuple(level[0] // base_dim for level in levels),
        "num_res_blocks": len(levels[0]),
        "temporal_downsample": tuple(temporal),
    }


def text_encoder_sizes(shapes: Shapes) -> dict[str, Any]:
    """Infer the sizes of a umT5 encoder from the shapes of its tensors, named as in either public layout.

    The result lacks `max_distance` and `eps`, which do not affect any shape.

    Raises:
        InputError: the tensors are not those of a umT5 encoder.
    """
    shapes = {TEXT_ENCODER_ALIASES.get(name, name): shape for name, shape in shapes.items()}
    layout = "original" if "token_embedding.weight" in shapes else "diffusers"
    names = {row.ours: getattr(row, layout) for row in text_encoder_rows(1)}

    def matrix(ours: str) -> tuple[int, int]:
        found = shapes.get(names[ours])
        if found is None:
            raise InputError(f"text encoder: tensor {names[ours]} is missing; expected the weights of a umT5 encoder")
        if len(found) != 2 or 0 in found:
            raise InputError(f"text encoder: tensor {names[ours]} has shape {list(found)}; expected a matrix")
        return found[0], found[1]

    vocab_size, dim = matrix("embedding")
    buckets, heads = matrix("blocks.attention.position_bias")
    prefix, suffix = names["blocks.attention.position_bias"].split(".0.", 1)
    layers = sum(name.startswith(f"{prefix}.") and name.endswith(f".{suffix}") for name in shapes)
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "heads": heads,
        "head_dim": matrix("blocks.attention.q.kernel")[0] // heads,
        "ffn_dim": matrix("blocks.ffn.gate.kernel")[0],
        "layers": layers,
        "buckets": buckets,
    }


SIZES: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "transformer": transformer_sizes,
    "vae": vae_sizes,
    "text_encoder": text_encoder_sizes,
}
"""Network -> the function that infers its sizes."""
