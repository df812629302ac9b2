"""Attention on a mesh: batch, tokens and heads each split over the devices that `tfm_jax.sharding.RULES` name.

Queries of one device must meet the keys of all. Two ways, both exact, forward and backward:

- all-to-all (Ulysses; Jacobs et al. 2023, arXiv:2309.14509): each device trades its share of the tokens for a share of
  the heads, runs attention over all tokens of those heads, and trades back. Where the heads divide, it moves least.
- a ring (Liu et al. 2023, arXiv:2310.01889), where they do not: keys and values travel from device to device, and each
  device joins what its queries find in every part by `lse`. In the backward pass the gradients of keys and values
  travel along with them, and arrive home complete.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from tfm_jax.sharding import RULES, num_shards, per_device
from tfm_jax.wan.attention import ATTENTION_OUTPUT, Keys, LogSum, Queries, attention, backward, forward

(SEQUENCE,) = RULES["tokens"]
HERE = ("batch", "tokens", "heads", None)
EVERYWHERE = ("batch", None, "heads", None)


def self_attention(query: Queries, key: Queries, value: Queries) -> Queries:
    """Attention of a video's tokens to each other, all three split alike."""
    return per_device(_among_tokens, (query, key, value), (HERE, HERE, HERE))


def cross_attention(query: Queries, key: Keys, value: Keys) -> Queries:
    """Attention of a video's tokens to a text, of which every device has the whole."""
    return per_device(attention, (query, key, value), (HERE, EVERYWHERE, EVERYWHERE))


def _among_tokens(query: Queries, key: Queries, value: Queries) -> Queries:
    """Of the tokens and heads of one device."""
    parts = num_shards("tokens")
    if parts == 1:
        return attention(query, key, value)
    return all_to_all(query, key, value) if query.shape[2] % parts == 0 else ring(query, key, value)


def all_to_all(query: Queries, key: Queries, value: Queries) -> Queries:
    """Attention to the tokens of all devices along `sequence`; their number divides the heads at hand."""
    query, key, value = (jax.lax.all_to_all(x, SEQUENCE, 2, 1, tiled=True) for x in (query, key, value))
    return jax.lax.all_to_all(attention(query, key, value), SEQUENCE, 1, 2, tiled=True)


@jax.custom_vjp
def ring(query: Queries, key: Queries, value: Queries) -> Queries:
    """Attention to the tokens of all devices along `sequence`, whatever the number of heads."""
    return _ring_forward(query, key, value)[0]


def _ring_forward(query: Queries, key: Queries, value: Queries) -> tuple[Queries, LogSum]:
    def meet(so_far: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        key, value, out, lse = so_far
        part, part_lse = forward(query, key, value)
        total = jnp.logaddexp(lse, part_lse)
        out = out * _shares(lse - total) + part * _shares(part_lse - total)
        return (*_pass_on(key, value), out, total), None

    lse = jnp.full((query.shape[0], query.shape[2], query.shape[1]), -jnp.inf, jnp.float32)
    start = (key, value, jnp.zeros_like(query, jnp.float32), lse)
    (_, _, out, lse), _ = jax.lax.scan(meet, start, length=num_shards("tokens"))
    return out.astype(query.dtype), lse


def _ring_save(query: Queries, key: Queries, value: Queries) -> tuple[Queries, tuple[Array, ...]]:
    out, lse = (checkpoint_name(x, ATTENTION_OUTPUT) for x in _ring_forward(query, key, value))
    return out, (query, key, value, out, lse)


def _ring_backward(saved: tuple[Array, ...], out_gradient: Queries) -> tuple[Queries, Queries, Queries]:
    query, key, value, out, lse = saved

    def meet(so_far: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        key, value, dquery, dkey, dvalue = so_far
        parts = backward(query, key, value, out, lse, out_gradient)
        dquery, dkey, dvalue = (total + part for total, part in zip((dquery, dkey, dvalue), parts, strict=True))
        return (*_pass_on(key, value), dquery, *_pass_on(dkey, dvalue)), None

    zeros = tuple(jnp.zeros_like(x, jnp.float32) for x in (query, key, value))
    (_, _, *gradients), _ = jax.lax.scan(meet, (key, value, *zeros), length=num_shards("tokens"))
    dquery, dkey, dvalue = (total.astype(x.dtype) for total, x in zip(gradients, (query, key, value), strict=True))
    return dquery, dkey, dvalue


ring.defvjp(_ring_save, _ring_backward)


def _pass_on(*arrays: Array) -> tuple[Array, ...]:
    """To the next device along `sequence`, from the one before."""
    parts = num_shards("tokens")
    following = [(place, (place + 1) % parts) for place in range(parts)]
    return tuple(jax.lax.ppermute(x, SEQUENCE, following) for x in arrays)


def _shares(log: Float32[Array, "b n s"]) -> Float[Array, "b s n 1"]:
    return rearrange(jnp.exp(log), "b n s -> b s n 1")
