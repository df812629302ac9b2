"""Splash attention, JAX's Pallas kernels for TPUs: blocks and padding for the calls in `splash_kernels.py`."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from tfm_jax.wan.attention import splash_kernels
from tfm_jax.wan.attention.kernel import Kernel, Keys, LogSumExp, Queries, heads_first, pad_tokens, tokens_first
from tfm_jax.wan.attention.splash_kernels import LANES, Blocks, Interpret

SMALL_BLOCK, LARGE_BLOCK = 512, 1024
"""Block sizes in tokens. A sequence of at most SMALL_BLOCK tokens is one block, padded to a multiple of LANES. A longer
one is padded to a multiple of SMALL_BLOCK and uses blocks of the other two sizes."""


def splash_forward(
    query: Queries, key: Keys, value: Keys, *, interpret: Interpret = False
) -> tuple[Queries, LogSumExp]:
    """Compute `out` and `lse`. If `interpret` is set, emulate the kernel on any platform, slowly, for tests."""
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    plan = plan_blocks(queries, keys)
    q = _heads(_scale(query), plan.queries)
    k, v = (_heads(x, plan.keys) for x in (key, value))
    out, lse = splash_kernels.forward(q, k, v, _is_padding(keys, plan.keys), plan.forward, interpret)
    return _videos(out, batch, queries), rearrange(lse[:, :queries], "(b n) s -> b n s", b=batch)


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
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    plan = plan_blocks(queries, keys)
    shift = jnp.einsum("bsnk,bsnk->bns", out.astype(jnp.float32), out_gradient.astype(jnp.float32))
    lse, shift = (rearrange(pad_tokens(x, plan.queries), "b n u -> (b n) u") for x in (lse, shift))
    # The output gradients of padded queries are zero, so they add nothing to the gradients of keys and values.
    q, dout = (_heads(x, plan.queries) for x in (_scale(query), out_gradient))
    k, v = (_heads(x, plan.keys) for x in (key, value))
    is_padding = _is_padding(keys, plan.keys)
    dq = splash_kernels.query_gradients(q, k, v, is_padding, lse, dout, shift, plan.query_gradients, interpret)
    dk, dv = splash_kernels.key_gradients(q, k, v, lse, dout, shift, plan.key_gradients, interpret)
    return _scale(_videos(dq, batch, queries)), _videos(dk, batch, keys), _videos(dv, batch, keys)


SPLASH = Kernel(splash_forward, splash_backward)


class BlockPlan(NamedTuple):
    """The padded numbers of queries and keys, and the blocks of each kernel."""

    queries: int
    keys: int
    forward: Blocks
    query_gradients: Blocks
    key_gradients: Blocks


def plan_blocks(queries: int, keys: int) -> BlockPlan:
    """Choose the blocks for these numbers of tokens.

    A kernel reads all keys once per block of queries (or, for the gradients of the keys, all queries once per block of
    keys). The number of operations per byte read from HBM is therefore about the number of tokens in that block. 1024
    is more than any TPU from v4 to tpu7x needs to keep its matrix units busy; v6e needs the most, 560. VMEM holds
    float32 scores, at most 1024 x 512 at a time. The gradients use two kernels instead of the fused one, because the
    fused one stores the gradients of the queries once per block of keys, so its memory is quadratic in the length.
    """
    padded, small, large = [], [], []
    for length in (queries, keys):
        step = LANES if length <= SMALL_BLOCK else SMALL_BLOCK
        padded.append(-(-length // step) * step)
        small.append(min(padded[-1], SMALL_BLOCK))
        large.append(LARGE_BLOCK if padded[-1] % LARGE_BLOCK == 0 else small[-1])
    return BlockPlan(
        *padded,
        forward=Blocks(large[0], large[1], compute=small[1]),
        query_gradients=Blocks(large[0], small[1], compute=small[1]),
        key_gradients=Blocks(small[0], large[1], compute=small[1]),
    )


def _is_padding(keys: int, padded: int) -> Bool[Array, " u"] | None:
    """Tell which keys are padding, or return None if none are."""
    return None if keys == padded else jnp.arange(padded) >= keys


def _heads(x: Float[Array, "b s n k"], length: int) -> Float[Array, "x u k"]:
    """Put the heads of all videos into one axis, and pad the tokens with zeros to `length`."""
    return rearrange(heads_first(x, length), "b n u k -> (b n) u k")


def _videos(x: Float[Array, "x u k"], batch: int, length: int) -> Float[Array, "b s n k"]:
    """Undo `_heads`: keep the first `length` tokens."""
    return tokens_first(rearrange(x, "(b n) u k -> b n u k", b=batch), length)


def _scale(x: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
    """Scale the queries or their gradients, since splash does not scale the scores. The result has the dtype of `x`."""
    return (x.astype(jnp.float32) * x.shape[-1] ** -0.5).astype(x.dtype)
