"""Attention in plain XLA: a scan over chunks of queries, each of which attends to all keys."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Shaped

from tfm_jax.precision import precision_of
from tfm_jax.wan.attention.kernel import Kernel, Keys, LogSumExp, Queries, heads_first, pad_tokens, tokens_first

QUERY_CHUNK = 128
"""Maximum number of queries per step: a head then has QUERY_CHUNK x keys scores in memory instead of queries x keys."""


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


CHUNKED = Kernel(chunked_forward, chunked_backward)
