"""Attention in plain XLA: a loop over groups of heads, and in it a scan over chunks of queries, each of which attends
to all keys. On a CPU, the scores of a few heads stay in the cache between the operations of a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Shaped

from tfm_jax.precision import precision_of
from tfm_jax.wan.attention.kernel import Kernel, Keys, LogSumExp, Queries, heads_first, pad_tokens, tokens_first

QUERY_CHUNK, SCORES = 512, 1_500_000
"""Maximum number of queries of a step, and of scores of a step, unless one head alone has more."""


def chunked_forward(query: Queries, key: Keys, value: Keys) -> tuple[Queries, LogSumExp]:
    k, v = heads_first(key), heads_first(value)
    scale = query.shape[-1] ** -0.5

    def chunk(q: Float[Array, "b n q k"]) -> tuple[Float[Array, "b n q k"], Float32[Array, "b n q"]]:
        scores = _einsum("bnqk,bntk->bnqt", q, k)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp((scores - largest) * scale)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _einsum("bnqt,bntk->bnqk", weights.astype(v.dtype), v) / total
        return out.astype(query.dtype), (largest * scale + jnp.log(total))[..., 0]

    queries = query.shape[1]
    out, lse = (_join_chunks(x) for x in jax.lax.map(chunk, _split_chunks(heads_first(query))))
    return tokens_first(out, queries), lse[:, :, :queries]


def chunked_backward(
    query: Queries, key: Keys, value: Keys, out: Queries, lse: LogSumExp, out_gradient: Queries
) -> tuple[Queries, Keys, Keys]:
    k, v = heads_first(key), heads_first(value)
    scale = query.shape[-1] ** -0.5
    # This equals the sum over keys of weight x gradient of the weight, but is computed without either.
    shift = _einsum("bsnk,bsnk->bns", out, out_gradient)

    # The gradients of keys and values are accumulated with the head width before the tokens (`b n k t`), so that the
    # matrix products transpose their small operand instead of the scores.
    def chunk(sums: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        q, dout, lse, shift = part
        weights = jnp.exp(_einsum("bnqk,bntk->bnqt", q, k) * scale - lse[..., None])
        dscores = weights * (_einsum("bnqk,bntk->bnqt", dout, v) - shift[..., None])
        dscores, weights = dscores.astype(query.dtype), weights.astype(query.dtype)
        dkey = sums[0] + _einsum("bnqk,bnqt->bnkt", q, dscores)
        dvalue = sums[1] + _einsum("bnqk,bnqt->bnkt", dout, weights)
        return (dkey, dvalue), (_einsum("bnqt,bntk->bnqk", dscores, k) * scale).astype(query.dtype)

    zeros = jnp.zeros_like(rearrange(k, "b n t k -> b n k t"), jnp.float32)
    # The padding of the last chunk adds nothing to the gradients of keys and values, because `q` and `dout` are zero.
    parts = tuple(_split_chunks(x) for x in (heads_first(query), heads_first(out_gradient), lse, shift))
    (dkey, dvalue), dquery = jax.lax.scan(chunk, (zeros, zeros), parts)
    dkey, dvalue = (rearrange(x, "b n k t -> b t n k") for x in (dkey * scale, dvalue))
    return tokens_first(_join_chunks(dquery), query.shape[1]), dkey.astype(key.dtype), dvalue.astype(value.dtype)


def _einsum(axes: str, x: Array, y: Array) -> Float32[Array, "..."]:
    """Compute an einsum that accumulates in float32."""
    return jnp.einsum(axes, x, y, precision=precision_of(x, y), preferred_element_type=jnp.float32)


def _split_chunks(x: Shaped[Array, "b n s ..."]) -> Shaped[Array, "i b n q ..."]:
    """Split the queries into equal chunks of at most `QUERY_CHUNK` queries, padding the last chunk with zeros."""
    length = x.shape[2]
    chunks = -(-length // QUERY_CHUNK)
    size = -(-length // chunks)
    return rearrange(pad_tokens(x, chunks * size), "b n (i q) ... -> i b n q ...", i=chunks)


def _join_chunks(x: Shaped[Array, "i b n q ..."]) -> Shaped[Array, "b n u ..."]:
    return rearrange(x, "i b n q ... -> b n (i q) ...")


def _few_heads_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` as a loop over groups of heads. It gets those of a group as videos with one head each."""

    def run(query: Queries, key: Keys, *others: Array) -> tuple[Array, ...]:
        batch, queries, heads, _ = query.shape
        at_once = max(1, SCORES // (min(queries, QUERY_CHUNK) * key.shape[1]))
        divisors = (n for n in range(1, batch * heads + 1) if batch * heads % n == 0)
        groups = next(n for n in divisors if batch * heads <= n * at_once)

        def split(x: Array) -> Array:
            rows = rearrange(x, "b n s -> (b n) 1 s" if x.ndim == 3 else "b s n k -> (b n) s 1 k")
            return rearrange(rows, "(i r) ... -> i r ...", i=groups)

        def join(x: Array) -> Array:
            rows = rearrange(x, "i r ... -> (i r) ...")
            return rearrange(rows, "(b n) 1 s -> b n s" if rows.ndim == 3 else "(b n) s 1 k -> b s n k", b=batch)

        parts = tuple(split(x) for x in (query, key, *others))
        return tuple(join(x) for x in jax.lax.map(lambda part: function(*part), parts))

    return run


CHUNKED = Kernel(_few_heads_at_a_time(chunked_forward), _few_heads_at_a_time(chunked_backward))
