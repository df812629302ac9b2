"""Splash attention, JAX's Pallas kernels for TPUs: blocks and layouts for the calls in `splash_kernels.py`."""

import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tfm_jax.wan.attention import splash_kernels
from tfm_jax.wan.attention.kernel import Kernel, Keys, LogSumExp, Queries
from tfm_jax.wan.attention.splash_kernels import LANES, Blocks, Interpret

FORWARD, BACKWARD = Blocks(queries=1024, keys=2048, compute=1024), Blocks(queries=1024, keys=2048, compute=512)
"""The largest blocks of both passes.

The forward pass reads all keys once per block of queries, and the backward pass all queries once per block of keys. The
number of operations per byte read from HBM is therefore about the number of tokens in that block. 1024 is more than any
TPU from v4 to tpu7x needs to keep its matrix units busy; v6e needs the most, 560. VMEM has to hold the float32 scores
of a block of queries and `compute` keys, in the backward pass several such arrays. v4 has the least, 16 MiB per core.
"""

SMALLEST = 512
"""A sequence of at most SMALLEST tokens is one block. A longer one has the largest blocks that divide its length, after
that was rounded up to a multiple of SMALLEST."""


def splash_forward(
    query: Queries, key: Keys, value: Keys, *, interpret: Interpret = False
) -> tuple[Queries, LogSumExp]:
    """Compute `out` and `lse`. If `interpret` is set, emulate the kernel on any platform, slowly, for tests."""
    scale, heads = query.shape[-1] ** -0.5, _heads_per_row(query)
    q, k, v = (_rows(x) for x in (query, key, value))
    blocks = fit(FORWARD, query.shape[1], key.shape[1])
    out, lse = splash_kernels.forward(_scale(q, scale), k, v, heads, blocks, interpret)
    return _videos(out, query), rearrange(lse, "(b n) s -> b n s", b=query.shape[0])


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
    scale, heads = query.shape[-1] ** -0.5, _heads_per_row(query)
    lse = rearrange(lse, "b n s -> (b n) s")
    q, k, v, out, dout = (_rows(x) for x in (query, key, value, out, out_gradient))
    blocks = fit(BACKWARD, query.shape[1], key.shape[1])
    dq, dk, dv = splash_kernels.backward(_scale(q, scale), k, v, out, lse, dout, heads, blocks, interpret)
    dq = _scale(dq, scale).astype(query.dtype)
    return _videos(dq, query), _videos(dk, key), _videos(dv, value)


SPLASH = Kernel(splash_forward, splash_backward)


def fit(largest: Blocks, queries: int, keys: int) -> Blocks:
    """Return blocks for these numbers of tokens. The last block may extend beyond the last token."""

    def size(length: int, size: int) -> int:
        if length <= SMALLEST:
            return pl.cdiv(length, LANES) * LANES
        while pl.cdiv(length, SMALLEST) * SMALLEST % size:
            size //= 2
        return size

    return Blocks(size(queries, largest.queries), size(keys, largest.keys), size(keys, largest.compute))


def _heads_per_row(x: Float[Array, "b s n k"]) -> int:
    """Return how many heads share a row: all of a video, which needs no transposition, if they fill whole lanes."""
    return x.shape[2] if x.shape[3] % LANES == 0 else 1


def _rows(x: Float[Array, "b s n k"]) -> Float[Array, "r s m"]:
    """Arrange the heads in rows."""
    return rearrange(x, "b s (i n) k -> (b i) s (n k)", n=_heads_per_row(x))


def _videos(x: Float[Array, "r s m"], like: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
    """Undo `_rows` for an array that had the shape of `like`."""
    return rearrange(x, "(b i) s (n k) -> b s (i n) k", b=like.shape[0], n=_heads_per_row(like))


def _scale(x: Float[Array, "r s m"], scale: float) -> Float[Array, "r s m"]:
    """Scale the queries or their gradients, since splash does not scale the scores. The result has the dtype of `x`."""
    return (x.astype(jnp.float32) * scale).astype(x.dtype)
