"""Attention on a mesh whose axes split batch, tokens and heads, according to `tfm_jax.sharding.RULES`.

In self-attention, the queries of one device attend to the keys of all devices along `sequence`. There are two exact and
differentiable methods:

- all-to-all (Ulysses; Jacobs et al. 2023, arXiv:2309.14509), if the number of devices divides the number of heads:
  each device exchanges its tokens for a share of the heads, attends to all tokens with those heads, and exchanges back.
  This needs less communication than the ring.
- a ring (Liu et al. 2023, arXiv:2310.01889) otherwise: keys and values are passed from device to device, and each
  device combines the partial outputs for its queries using their log-sum-exp (`lse`). In the backward pass, the
  gradients of keys and values travel with them, and are complete once they are back on their own device.

Keys and values of self-attention have as many tokens as the queries, and therefore the same type, `Queries`.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32

from tfm_jax.sharding import RULES, num_shards, per_device
from tfm_jax.wan.attention.dispatch import attention, backward, forward, save_output
from tfm_jax.wan.attention.kernel import Keys, LogSumExp, Queries
from tfm_jax.wan.rotary import Rotary, apply_rotary

(SEQUENCE,) = RULES["tokens"]
SPLIT_TOKENS = ("batch", "tokens", "heads", None)
ALL_TOKENS = ("batch", None, "heads", None)


def self_attention(query: Queries, key: Queries, value: Queries, rotary: Rotary) -> Queries:
    """Let the tokens of a video attend to each other, after the rotary embedding of queries and keys.

    Every device holds its part of the first three arrays, and the rotary angles of all tokens.
    """
    axes = (SPLIT_TOKENS, SPLIT_TOKENS, SPLIT_TOKENS, (None, None))
    return per_device(_sequence_attention, (query, key, value, rotary), axes)


def cross_attention(query: Queries, key: Keys, value: Keys) -> Queries:
    """Let the tokens of a video attend to those of its text. Every device holds all tokens of the text."""
    return per_device(attention, (query, key, value), (SPLIT_TOKENS, ALL_TOKENS, ALL_TOKENS))


def _sequence_attention(query: Queries, key: Queries, value: Queries, rotary: Rotary) -> Queries:
    """Self-attention from one device's tokens and heads to the tokens of all devices along `sequence`."""
    shards = num_shards("tokens")
    if shards == 1:
        return _rotated_attention(query, key, value, rotary)
    if query.shape[2] % shards == 0:
        return all_to_all(query, key, value, rotary)
    tokens = query.shape[1]
    start = jax.lax.axis_index(SEQUENCE) * tokens
    own = tuple(jax.lax.dynamic_slice_in_dim(table, start, tokens) for table in rotary)
    return ring(apply_rotary(query, own), apply_rotary(key, own), value)


def _rotated_attention(query: Queries, key: Queries, value: Queries, rotary: Rotary) -> Queries:
    return attention(apply_rotary(query, rotary), apply_rotary(key, rotary), value)


def all_to_all(query: Queries, key: Queries, value: Queries, rotary: Rotary) -> Queries:
    """Attend to the tokens of all devices along `sequence`.

    Requires that the number of these devices divides the number of local heads. The rotary embedding comes after the
    exchange, because all tokens of a video are more likely to fill the tiles of a TPU than a part of them.
    """
    query, key, value = (jax.lax.all_to_all(x, SEQUENCE, 2, 1, tiled=True) for x in (query, key, value))
    return jax.lax.all_to_all(_rotated_attention(query, key, value, rotary), SEQUENCE, 1, 2, tiled=True)


@jax.custom_vjp
def ring(query: Queries, key: Queries, value: Queries) -> Queries:
    """Attend to the tokens of all devices along `sequence`, with any number of heads."""
    return _ring_scan(query, key, value)[0]


def _ring_scan(query: Queries, key: Queries, value: Queries) -> tuple[Queries, LogSumExp]:
    def step(carry: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        key, value, out, lse = carry
        block_out, block_lse = forward(query, key, value)
        total = jnp.logaddexp(lse, block_lse)
        out = out * _weights(lse - total) + block_out * _weights(block_lse - total)
        return (*_pass_on(key, value), out, total), None

    lse = jnp.full((query.shape[0], query.shape[2], query.shape[1]), -jnp.inf, jnp.float32)
    start = (key, value, jnp.zeros_like(query, jnp.float32), lse)
    (_, _, out, lse), _ = jax.lax.scan(step, start, length=num_shards("tokens"))
    return out.astype(query.dtype), lse


def _ring_fwd(query: Queries, key: Queries, value: Queries) -> tuple[Queries, tuple[Array, ...]]:
    out, lse = save_output(*_ring_scan(query, key, value))
    return out, (query, key, value, out, lse)


def _ring_bwd(residuals: tuple[Array, ...], out_gradient: Queries) -> tuple[Queries, Queries, Queries]:
    query, key, value, out, lse = residuals

    def step(carry: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        key, value, dquery, dkey, dvalue = carry
        block = backward(query, key, value, out, lse, out_gradient)
        dquery, dkey, dvalue = (total + part for total, part in zip((dquery, dkey, dvalue), block, strict=True))
        return (*_pass_on(key, value), dquery, *_pass_on(dkey, dvalue)), None

    zeros = tuple(jnp.zeros_like(x, jnp.float32) for x in (query, key, value))
    (_, _, *gradients), _ = jax.lax.scan(step, (key, value, *zeros), length=num_shards("tokens"))
    dquery, dkey, dvalue = (total.astype(x.dtype) for total, x in zip(gradients, (query, key, value), strict=True))
    return dquery, dkey, dvalue


ring.defvjp(_ring_fwd, _ring_bwd)


def _pass_on(*arrays: Array) -> tuple[Array, ...]:
    """Send the arrays to the next device along `sequence`, and return the arrays of the previous device."""
    shards = num_shards("tokens")
    next_device = [(index, (index + 1) % shards) for index in range(shards)]
    return tuple(jax.lax.ppermute(x, SEQUENCE, next_device) for x in arrays)


def _weights(log: Float32[Array, "b n s"]) -> Float[Array, "b s n 1"]:
    return rearrange(jnp.exp(log), "b n s -> b s n 1")
