"""The umT5 encoder of transformers with random weights, and our encoder with the same weights."""

import functools

import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from transformers import UMT5Config, UMT5EncoderModel

from tfm_jax.wan.names import TEXT_ENCODER_ALIASES, text_encoder_rows
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder


def umt5_config(config: TextEncoderConfig) -> UMT5Config:
    return UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        num_heads=config.heads,
        d_kv=config.head_dim,
        d_ff=config.ffn_dim,
        num_layers=config.layers,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.eps,
    )


def reference_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    """Return the encoder of transformers with random weights, norms and biases, so that each affects the output."""
    torch.manual_seed(config.vocab_size)
    model = UMT5EncoderModel(umt5_config(config)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "layer_norm" in name or "relative_attention_bias" in name:
            weight.add_(torch.randn_like(weight) * 0.5)
    return model


def from_state_dict(
    config: TextEncoderConfig, tensors: dict[str, torch.Tensor], layout: str, dtype: DTypeLike = jnp.float32
) -> UMT5Encoder:
    encoder = nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    rows = text_encoder_rows(config.layers)
    assert sorted(getattr(row, layout) for row in rows) == sorted(tensors)
    values: dict[str, np.ndarray] = {}
    for row in rows:
        value = rearrange(tensors[getattr(row, layout)].numpy(), row.axes)
        if row.layer is None:
            values[row.ours] = value
        else:
            values.setdefault(row.ours, np.zeros((config.layers, *value.shape), np.float32))[row.layer] = value
    for ours, value in values.items():
        variable = functools.reduce(getattr, ours.split("."), encoder)
        assert variable.shape == value.shape, ours
        variable.set_value(jnp.asarray(value, variable.dtype))
    return encoder


def diffusers_tensors(model: UMT5EncoderModel) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.state_dict().items() if name not in TEXT_ENCODER_ALIASES}
