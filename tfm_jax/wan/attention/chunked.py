"""Attention in plain XLA: a loop over groups of heads, and in it a scan over chunks of queries, each of which attends
to all keys. On a CPU, the scores of a few heads stay in the cache between the operations of a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Shaped

from tfm_jax.precision import precision_of
from tfm_jax.wan.attention.kernel import Kernel, Keys, Queries

QUERY_CHUNK, SCORES = 512, 1_500_000
"""Maximum number of queries of a step, and of scores of a step, unless one head alone has more."""

HeadQueries = Float[Array, "r s k"]
HeadKeys = Float[Array, "r t k"]
HeadSums = Float32[Array, "r s"]
"""Arrays of the heads of a group, whatever videos they belong to."""


def chunked_forward(query: HeadQueries, key: HeadKeys, value: HeadKeys) -> tuple[HeadQueries, HeadSums]:
    """Compute `out` and `lse` of a group of heads."""
    scale = query.shape[-1] ** -0.5

    def chunk(q: Float[Array, "r q k"]) -> tuple[Float[Array, "r q k"], Float32[Array, "r q"]]:
        scores = _einsum("rqk,rtk->rqt", q, key)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp((scores - largest) * scale)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _einsum("rqt,rtk->rqk", weights.astype(value.dtype), value) / total
        return out.astype(query.dtype), (largest * scale + jnp.log(total))[..., 0]

    out, lse = jax.lax.map(chunk, _split_chunks(query))
    return _join_chunks(out, query.shape[1]), _join_chunks(lse, query.shape[1])


def chunked_backward(
    query: HeadQueries, key: HeadKeys, value: HeadKeys, out: HeadQueries, lse: HeadSums, out_gradient: HeadQueries
) -> tuple[HeadQueries, HeadKeys, HeadKeys]:
    """Compute the gradients of a group of heads."""
    scale = query.shape[-1] ** -0.5
    # This equals the sum over keys of weight x gradient of the weight, but is computed without either.
    shift = _einsum("rsk,rsk->rs", out, out_gradient)

    # The gradients of keys and values are accumulated with the head width before the tokens (`r k t`), so that the
    # matrix products transpose their small operand instead of the scores.
    def chunk(sums: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        q, dout, lse, shift = part
        weights = jnp.exp(_einsum("rqk,rtk->rqt", q, key) * scale - lse[..., None])
        dscores = weights * (_einsum("rqk,rtk->rqt", dout, value) - shift[..., None])
        dscores, weights = dscores.astype(query.dtype), weights.astype(query.dtype)
        dkey = sums[0] + _einsum("rqk,rqt->rkt", q, dscores)
        dvalue = sums[1] + _einsum("rqk,rqt->rkt", dout, weights)
        return (dkey, dvalue), (_einsum("rqt,rtk->rqk", dscores, key) * scale).astype(query.dtype)

    zeros = jnp.zeros_like(rearrange(key, "r t k -> r k t"), jnp.float32)
    # The padding of the last chunk adds nothing to the gradients of keys and values, because `q` and `dout` are zero.
    parts = tuple(_split_chunks(x) for x in (query, out_gradient, lse, shift))
    (dkey, dvalue), dquery = jax.lax.scan(chunk, (zeros, zeros), parts)
    # Without the barrier, XLA would merge the transposition with the products if there is only one chunk.
    dkey, dvalue = jax.lax.optimization_barrier((dkey, dvalue))
    dkey, dvalue = (rearrange(x, "r k t -> r t k") for x in (dkey * scale, dvalue))
    return _join_chunks(dquery, query.shape[1]), dkey.astype(key.dtype), dvalue.astype(value.dtype)


def _einsum(axes: str, x: Array, y: Array) -> Float32[Array, "..."]:
    """Compute an einsum that accumulates in float32."""
    return jnp.einsum(axes, x, y, precision=precision_of(x, y), preferred_element_type=jnp.float32)


def _split_chunks(x: Shaped[Array, "r s ..."]) -> Shaped[Array, "i r q ..."]:
    """Split the queries into equal chunks of at most `QUERY_CHUNK` queries, padding the last chunk with zeros."""
    length = x.shape[1]
    chunks = -(-length // QUERY_CHUNK)
    size = -(-length // chunks)
    x = jnp.pad(x, [(0, 0), (0, chunks * size - length), *[(0, 0)] * (x.ndim - 2)])
    return rearrange(x, "r (i q) ... -> i r q ...", i=chunks)


def _join_chunks(x: Shaped[Array, "i r q ..."], length: int) -> Shaped[Array, "r s ..."]:
    """Undo `_split_chunks`: keep the first `length` queries."""
    return rearrange(x, "i r q ... -> r (i q) ...")[:, :length]


def _group_by_group(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` for all heads of all videos, as a loop over groups of heads."""

    def run(query: Queries, key: Keys, *others: Array) -> tuple[Array, ...]:
        batch, queries, heads, _ = query.shape
        at_once = max(1, SCORES // (min(queries, QUERY_CHUNK) * key.shape[1]))
        divisors = (n for n in range(1, batch * heads + 1) if batch * heads % n == 0)
        groups = next(n for n in divisors if batch * heads <= n * at_once)

        def split(x: Array) -> Array:
            rows = rearrange(x, "b n s -> (b n) s" if x.ndim == 3 else "b s n k -> (b n) s k")
            return rearrange(rows, "(i r) ... -> i r ...", i=groups)

        def join(x: Array) -> Array:
            rows = rearrange(x, "i r ... -> (i r) ...")
            return rearrange(rows, "(b n) s -> b n s" if rows.ndim == 2 else "(b n) s k -> b s n k", b=batch)

        parts = tuple(split(x) for x in (query, key, *others))
        return tuple(join(x) for x in jax.lax.map(lambda part: function(*part), parts))

    return run


CHUNKED = Kernel(_group_by_group(chunked_forward), _group_by_group(chunked_backward))
"""Attention in plain XLA, for all platforms and dtypes."""
