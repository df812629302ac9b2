"""Splash attention, JAX's Pallas kernels for TPUs: blocks and padding for the calls in `splash_kernels.py`."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from tfm_jax.wan.attention import splash_kernels
from tfm_jax.wan.attention.kernel import Kernel, Keys, LogSumExp, Queries, pad_tokens
from tfm_jax.wan.attention.splash_kernels import LANES, Blocks, Interpret

FORWARD, BACKWARD = Blocks(queries=1024, keys=2048, compute=1024), Blocks(queries=1024, keys=2048, compute=512)
"""The largest blocks of both passes.

The forward pass reads all keys once per block of queries, and the backward pass all queries once per block of keys. The
number of operations per byte read from HBM is therefore about the number of tokens in that block. 1024 is more than any
TPU from v4 to tpu7x needs to keep its matrix units busy; v6e needs the most, 560. VMEM has to hold the float32 scores
of a block of queries and `compute` keys, in the backward pass several such arrays. v4 has the least, 16 MiB per core.
"""

SMALLEST = 512
"""A sequence of at most SMALLEST tokens is one block, padded to a multiple of LANES. A longer one is padded to a
multiple of SMALLEST, and has the largest blocks that divide it."""


def splash_forward(
    query: Queries, key: Keys, value: Keys, *, interpret: Interpret = False
) -> tuple[Queries, LogSumExp]:
    """Compute `out` and `lse`. If `interpret` is set, emulate the kernel on any platform, slowly, for tests."""
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    all_queries, all_keys = padded(queries), padded(keys)
    q = _rows(_scale(query), all_queries)
    k, v = (_rows(x, all_keys) for x in (key, value))
    blocks = fit(FORWARD, all_queries, all_keys)
    out, lse = splash_kernels.forward(q, k, v, _is_padding(keys, all_keys), _heads_per_row(query), blocks, interpret)
    return _videos(out, query), rearrange(lse[:, :queries], "(b n) s -> b n s", b=batch)


def splash_backward(
    query: Queries,
    key: Keys,
    value: Keys,
    out: Queries,
    lse: LogSumExp,
    out_gradient: Queries,
    *,
    interpret: Interpret = False,
) -> tuple[Queries, Keys, Keys]:
    queries, keys, heads = query.shape[1], key.shape[1], _heads_per_row(query)
    all_queries, all_keys = padded(queries), padded(keys)
    shift = jnp.einsum("bsnk,bsnk->bns", out.astype(jnp.float32), out_gradient.astype(jnp.float32))
    lse, shift = (rearrange(pad_tokens(x, all_queries), "b n u -> (b n) u") for x in (lse, shift))
    # The output gradients of padded queries are zero, so they add nothing to the gradients of keys and values.
    q, dout = (_rows(x, all_queries) for x in (_scale(query), out_gradient))
    k, v = (_rows(x, all_keys) for x in (key, value))
    blocks = fit(BACKWARD, all_queries, all_keys)
    is_padding = _is_padding(keys, all_keys)
    dq, dk, dv = splash_kernels.backward(q, k, v, is_padding, lse, dout, shift, heads, blocks, interpret)
    dquery = _scale(_videos(dq, query)).astype(query.dtype)
    return dquery, _videos(dk, key), _videos(dv, value)


SPLASH = Kernel(splash_forward, splash_backward)


def padded(length: int) -> int:
    """Return the number of tokens after padding."""
    step = LANES if length <= SMALLEST else SMALLEST
    return -(-length // step) * step


def fit(largest: Blocks, queries: int, keys: int) -> Blocks:
    """Return blocks that divide these padded numbers of tokens."""

    def size(length: int, size: int) -> int:
        if length <= SMALLEST:
            return length
        while length % size:
            size //= 2
        return size

    return Blocks(size(queries, largest.queries), size(keys, largest.keys), size(keys, largest.compute))


def _is_padding(keys: int, padded: int) -> Bool[Array, " u"] | None:
    """Tell which keys are padding, or return None if none are."""
    return None if keys == padded else jnp.arange(padded) >= keys


def _heads_per_row(x: Float[Array, "b s n k"]) -> int:
    """Return how many heads share a row: all of a video, which needs no transposition, if they fill whole lanes."""
    return x.shape[2] if x.shape[3] % LANES == 0 else 1


def _rows(x: Float[Array, "b s n k"], length: int) -> Float[Array, "r u m"]:
    """Arrange the heads in rows, and pad the tokens with zeros to `length`."""
    rows = rearrange(x, "b s (i n) k -> (b i) s (n k)", n=_heads_per_row(x))
    return jnp.pad(rows, ((0, 0), (0, length - x.shape[1]), (0, 0)))


def _videos(x: Float[Array, "r u m"], like: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
    """Undo `_rows` for an array that had the shape of `like`."""
    heads = _heads_per_row(like)
    return rearrange(x[:, : like.shape[1]], "(b i) s (n k) -> b s (i n) k", b=like.shape[0], n=heads)


def _scale(x: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
    """Scale the queries or their gradients, since splash does not scale the scores. The result has the dtype of `x`."""
    return (x.astype(jnp.float32) * x.shape[-1] ** -0.5).astype(x.dtype)
