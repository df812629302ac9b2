"""The 3-D rotary positions of self-attention (`rope_apply` in `wan/modules/model.py` of Wan-Video/Wan2.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32

THETA = 10_000.0
SUBLANES = 8
"""Tokens of a tile in the memory of a TPU."""

Heads = Float[Array, "b s n k"]
Rotary = tuple[Float32[Array, "p k"], Float32[Array, "p k"]]
"""cos and sin of the angle of each channel, for all positions `p`."""


def rotary_tables(grid: tuple[int, int, int], head_dim: int) -> Rotary:
    """Return cos and sin, each `[f h w, head_dim]`, of the rotary angles for a grid of tokens.

    The channels 2 i and 2 i + 1 are a pair and share an angle. Height and width use `2 (head_dim // 6)` channels each,
    and time uses the rest. Positions are integers from 0. Angles are computed in float64, because float32 rounding
    errors would grow with the position in long clips.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for length, width in zip(grid, (head_dim - 2 * side, side, side), strict=True):
        frequencies = THETA ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        angles.append(np.outer(np.arange(length), frequencies))
    f, h, w = grid
    time, height, width = angles
    table = np.concatenate(
        [
            np.broadcast_to(time[:, None, None], (f, h, w, time.shape[-1])),
            np.broadcast_to(height[None, :, None], (f, h, w, height.shape[-1])),
            np.broadcast_to(width[None, None, :], (f, h, w, width.shape[-1])),
        ],
        axis=-1,
    )
    table = rearrange(table, "f h w k -> (f h w) k")
    cos, sin = (jnp.repeat(jnp.asarray(function(table), jnp.float32), 2, axis=-1) for function in (np.cos, np.sin))
    return cos, sin


@jax.custom_vjp
def apply_rotary(x: Heads, rotary: Rotary) -> Heads:
    """Rotate the channel pairs (0, 1), (2, 3), ... of every head by the angles of their token.

    This is written for TPUs. There, a linear layer returns tiles of 8 tokens x 128 channels. The axes below leave the
    tiles of each head as they are, so that the whole rotation is one pass over the array; for `[b s n k]`, it would be
    copied to tiles of 8 heads x 128 channels first. The partner of a channel comes from a copy that is shifted by one
    channel, which is cheaper than strided slices. The gradient is written out because JAX's own would shift in float32.
    """
    group = math.gcd(x.shape[1], SUBLANES)
    cos, sin = (rearrange(table, "(s g) k -> s 1 g k", g=group) for table in rotary)
    tiles = rearrange(x, "b (s g) n k -> b s n g k", g=group)
    left, right = (
        jax.lax.pad(tiles, jnp.zeros((), x.dtype), [(0, 0, 0)] * 4 + [(shift, -shift, 0)]) for shift in (-1, 1)
    )
    turned = jnp.where(np.arange(x.shape[-1]) % 2 == 0, -left, right)
    rotated = (tiles.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)
    return rearrange(rotated, "b s n g k -> b (s g) n k")


def _rotary_forward(x: Heads, rotary: Rotary) -> tuple[Heads, Rotary]:
    return apply_rotary(x, rotary), rotary


def _rotary_backward(rotary: Rotary, gradient: Heads) -> tuple[Heads, None]:
    """Rotate back: the transpose of a rotation is its inverse."""
    cos, sin = rotary
    return apply_rotary(gradient, (cos, -sin)), None


apply_rotary.defvjp(_rotary_forward, _rotary_backward)
