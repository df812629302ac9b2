"""Splash attention, JAX's Pallas kernel for TPUs.

The public constructor, `make_splash_mha`, does not suffice: a kernel that returns `lse` (`save_residuals=True`) has no
gradient, the gradients of the other kernels do not accept an `lse` over more keys (which `sharded.ring` needs), and
even a full mask becomes tables that the kernel reads for each block. No other module uses the private parts of splash,
and tests/test_private_apis.py checks them against the installed JAX.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float

from tfm_jax.wan.attention.kernel import Kernel, Keys, LogSumExp, Queries, heads_first, pad_tokens, tokens_first

LANES, SMALL_BLOCK, LARGE_BLOCK = 128, 512, 1024
"""Block sizes in tokens. A sequence of at most SMALL_BLOCK tokens is one block, padded to a multiple of LANES. A longer
one is padded to a multiple of SMALL_BLOCK and uses blocks of the other two sizes."""

_UNMASKED = MaskInfo(None, None, None, None, None)
_MASK_VALUE = splash.DEFAULT_MASK_VALUE


def splash_forward(query: Queries, key: Keys, value: Keys, *, interpret: bool = False) -> tuple[Queries, LogSumExp]:
    """Compute `out` and `lse`. If `interpret` is set, emulate the kernel on any platform, slowly, for tests."""
    queries, keys = query.shape[1], key.shape[1]
    sizes, padded_queries, padded_keys = block_sizes(queries, keys)
    kernel = splash.SplashAttentionKernel(
        _UNMASKED,
        None,
        None,
        is_mqa=False,
        block_sizes=sizes,
        save_residuals=True,
        mask_value=_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )
    segments = _segment_ids(keys, padded_queries, padded_keys)
    q, k, v = heads_first(_scale(query), padded_queries), heads_first(key, padded_keys), heads_first(value, padded_keys)
    out, (lse,) = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)
    return tokens_first(out, queries), lse[:, :, :queries]


def splash_backward(
    query: Queries,
    key: Keys,
    value: Keys,
    out: Queries,
    lse: LogSumExp,
    out_gradient: Queries,
    *,
    interpret: bool = False,
) -> tuple[Queries, Keys, Keys]:
    queries, keys = query.shape[1], key.shape[1]
    sizes, padded_queries, padded_keys = block_sizes(queries, keys)
    segments = _segment_ids(keys, padded_queries, padded_keys)

    def kernel(q: Array, k: Array, v: Array, out: Array, lse: Array, dout: Array) -> tuple[Array, ...]:
        residuals = (q, k, v, segments, None, out, lse, _UNMASKED, _UNMASKED)
        settings = (False, _MASK_VALUE, False, sizes, None, None, None, interpret)  # as in splash_forward
        return splash._splash_attention_bwd(*settings, residuals, dout)[3:6]

    # The output gradients of padded queries are zero, so they add nothing to the gradients of keys and values.
    q, out, dout = (heads_first(x, padded_queries) for x in (_scale(query), out, out_gradient))
    k, v = heads_first(key, padded_keys), heads_first(value, padded_keys)
    dq, dk, dv = jax.vmap(kernel)(q, k, v, out, pad_tokens(lse, padded_queries), dout)
    return _scale(tokens_first(dq, queries)), tokens_first(dk, keys), tokens_first(dv, keys)


SPLASH = Kernel(splash_forward, splash_backward)


def block_sizes(queries: int, keys: int) -> tuple[splash.BlockSizes, int, int]:
    """Return the block sizes, the padded number of queries and the padded number of keys.

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
    sizes = splash.BlockSizes(
        block_q=large[0],
        block_kv=large[1],
        block_kv_compute=small[1],
        block_q_dkv=small[0],
        block_kv_dkv=large[1],
        block_kv_dkv_compute=small[1],
        block_q_dq=large[0],
        block_kv_dq=small[1],
    )
    return sizes, padded[0], padded[1]


def _segment_ids(keys: int, padded_queries: int, padded_keys: int) -> splash.SegmentIds | None:
    """Return segment ids that mask padded keys, or None if there are none.

    Tokens attend only within their segment, and the padded keys form a second segment without queries.
    """
    if keys == padded_keys:
        return None
    padding = jnp.arange(padded_keys) >= keys
    return splash.SegmentIds(jnp.zeros(padded_queries, jnp.int32), padding.astype(jnp.int32))


def _scale(x: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
    """Scale the queries or their gradients, since splash does not scale the scores. The result has the dtype of `x`."""
    return (x.astype(jnp.float32) * x.shape[-1] ** -0.5).astype(x.dtype)
