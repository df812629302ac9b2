"""One attention for every Wan network that needs one at scale."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

QUERY_CHUNK = 512
"""Queries handled at a time: scores take chunk x keys per head instead of queries x keys."""


def attention(
    query: Float[Array, "b s n k"], key: Float[Array, "b t n k"], value: Float[Array, "b t n k"]
) -> Float[Array, "b s n k"]:
    """Exact softmax attention, `n` heads of width `k`, with no mask; scores and softmax in float32.

    Queries go through in chunks, each recomputed in the backward pass, so that memory grows linearly in `s`.
    """
    q, k, v = (rearrange(x, "b s n k -> b n s k") for x in (query, key, value))
    scale = query.shape[-1] ** -0.5

    def chunk(q: Float[Array, "b n q k"]) -> Float[Array, "b n q k"]:
        scores = jnp.einsum("bnqk,bntk->bnqt", q, k, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bnqt,bntk->bnqk", weights, v)

    length = q.shape[2]
    if length <= QUERY_CHUNK:
        out = chunk(q)
    else:
        padded = jnp.pad(q, ((0, 0), (0, 0), (0, -length % QUERY_CHUNK), (0, 0)))
        chunks = rearrange(padded, "b n (i q) k -> i b n q k", q=QUERY_CHUNK)
        out = rearrange(jax.lax.map(jax.checkpoint(chunk), chunks), "i b n q k -> b n (i q) k")[:, :, :length]
    return rearrange(out, "b n s k -> b s n k")
