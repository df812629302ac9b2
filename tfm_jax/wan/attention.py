"""One attention for every Wan network that needs one at scale: exact, unmasked, and linear in memory.

Three kernels compute it. Each is a pair of functions over the arrays that one device holds:

    forward(query, key, value) -> (out, lse)
    backward(query, key, value, out, lse, out_gradient) -> (query, key and value gradients)

`lse` is the log of the sum of the exponentials of the scores that each query meets. No scores are kept: the backward
pass makes them again, block by block, from `lse` (Dao 2023, arXiv:2307.08691, sections 2.3 and 3.1). `out` and `lse`
may come from a softmax over more keys than the `key` at hand; the gradients are then the share of these keys.

- `SPLASH` on TPU, for bfloat16 or float16. Pallas calls are not partitioned by the compiler: on more than one chip
  `attention` is called through `tfm_jax.sharding.per_device`, else lowering raises NotImplementedError.
- `CUDNN` on NVIDIA GPUs, where JAX lets it train: bfloat16 or float16, heads whose width is a multiple of 8 up to 128,
  even numbers of queries and of keys. It tells the compiler how to split batch and heads, so it needs no `shard_map`.
- `CHUNKED` everywhere else, and for float32 on every platform: cuDNN has no float32 attention, splash would multiply
  float32 as bfloat16, and rounding behind the caller's back is worse than slow. It is plain XLA: batch and heads split
  without communication.

The choice falls when a program is lowered, not when it is traced: `jax.default_backend()` says cpu while a program is
compiled on an ordinary machine for a TPU that is not there. cuDNN is the exception: JAX traces it only where it finds
an NVIDIA GPU and the library (`tfm_jax.planning.chips` pretends both).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.extend.backend import backends
from jaxtyping import Array, Float, Float32, Shaped

from tfm_jax.precision import precision_of

ATTENTION_OUTPUT = "attention_output"
"""What `out` and `lse` are called: a remat policy that saves this name never runs attention's forward pass again."""

QUERY_CHUNK = 128
"""Queries that the chunked kernel handles at a time: its scores take chunk x keys per head, not queries x keys."""

LANES, SMALL_BLOCK, LARGE_BLOCK = 128, 512, 1024
"""Splash blocks, in tokens: what every one is a multiple of, and the two sizes that long sequences use."""

Queries = Float[Array, "b s n k"]
Keys = Float[Array, "b t n k"]
LogSum = Float32[Array, "b n s"]


class Kernel(NamedTuple):
    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


@jax.custom_vjp
def attention(query: Queries, key: Keys, value: Keys) -> Queries:
    """Exact softmax attention, `n` heads of width `k`, with no mask; scores and softmax in float32.

    Memory grows linearly in `s` and `t`, in the forward pass and in the backward pass.
    """
    return forward(query, key, value)[0]


def forward(query: Queries, key: Keys, value: Keys) -> tuple[Queries, LogSum]:
    """`out` and `lse`, by the kernel of the platform that the program is lowered for."""
    branches = {platform: kernel.forward for platform, kernel in _kernels(query, key).items()}
    return jax.lax.platform_dependent(query, key, value, default=CHUNKED.forward, **branches)


def backward(
    query: Queries, key: Keys, value: Keys, out: Queries, lse: LogSum, out_gradient: Queries
) -> tuple[Queries, Keys, Keys]:
    """Gradients of query, key and value, by the kernel of the platform that the program is lowered for."""
    branches = {platform: kernel.backward for platform, kernel in _kernels(query, key).items()}
    args = (query, key, value, out, lse, out_gradient)
    return jax.lax.platform_dependent(*args, default=CHUNKED.backward, **branches)


def _kernels(query: Queries, key: Keys) -> dict[str, Kernel]:
    """What runs where; every platform not named runs `CHUNKED`."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return {}
    kernels, width = {"tpu": SPLASH}, query.shape[-1]
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    if width <= 128 and width % 8 == 0 and even and "cuda" in backends():
        kernels["cuda"] = CUDNN
    return kernels


def _save(query: Queries, key: Keys, value: Keys) -> tuple[Queries, tuple[Array, Array, Array, Array, Array]]:
    # The names stand outside the choice of platform: a remat policy does not see into it.
    out, lse = (checkpoint_name(x, ATTENTION_OUTPUT) for x in forward(query, key, value))
    return out, (query, key, value, out, lse)


def _restore(saved: tuple[Array, Array, Array, Array, Array], out_gradient: Queries) -> tuple[Queries, Keys, Keys]:
    return backward(*saved, out_gradient)


attention.defvjp(_save, _restore)


def _rows(x: Float[Array, "b s n k"], length: int | None = None) -> Float[Array, "b n u k"]:
    """Tokens innermost but one, as the kernels of this file take them, padded with zeros up to `length`."""
    x = rearrange(x, "b s n k -> b n s k")
    return x if length is None else _pad(x, length)


def _tokens(x: Float[Array, "b n u k"], length: int) -> Float[Array, "b s n k"]:
    """The first `length` tokens, back where `attention` has them."""
    return rearrange(x[:, :, :length], "b n s k -> b s n k")


def _pad(x: Shaped[Array, "b n s ..."], length: int) -> Shaped[Array, "b n u ..."]:
    return jnp.pad(x, [(0, length - size if axis == 2 else 0) for axis, size in enumerate(x.shape)])


# The chunked kernel: a scan over chunks of queries, each of which meets all keys.


def chunked_forward(query: Queries, key: Keys, value: Keys) -> tuple[Queries, LogSum]:
    k, v = _rows(key), _rows(value)
    scale = query.shape[-1] ** -0.5

    def chunk(q: Float[Array, "b n q k"]) -> tuple[Float[Array, "b n q k"], Float32[Array, "b n q"]]:
        scores = _product("bnqk,bntk->bnqt", q, k)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp((scores - highest) * scale)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _product("bnqt,bntk->bnqk", weights.astype(v.dtype), v) / total
        return out.astype(query.dtype), (highest * scale + jnp.log(total))[..., 0]

    queries = query.shape[1]
    out, lse = (_join(x) for x in jax.lax.map(chunk, _split(_rows(query))))
    return _tokens(out, queries), lse[:, :, :queries]


def chunked_backward(
    query: Queries, key: Keys, value: Keys, out: Queries, lse: LogSum, out_gradient: Queries
) -> tuple[Queries, Keys, Keys]:
    k, v = _rows(key), _rows(value)
    scale = query.shape[-1] ** -0.5
    # The sum over keys of weight times gradient of the weight, without either.
    shift = _product("bsnk,bsnk->bns", out, out_gradient)

    # Gradients of keys and values are summed with the head width before the tokens: the product that makes them then
    # transposes the slim operand and not the scores.
    def chunk(sums: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        q, dout, lse, shift = part
        weights = jnp.exp(_product("bnqk,bntk->bnqt", q, k) * scale - lse[..., None])
        dscores = weights * (_product("bnqk,bntk->bnqt", dout, v) - shift[..., None])
        dscores, weights = dscores.astype(query.dtype), weights.astype(query.dtype)
        dkey = sums[0] + _product("bnqk,bnqt->bnkt", q, dscores)
        dvalue = sums[1] + _product("bnqk,bnqt->bnkt", dout, weights)
        return (dkey, dvalue), (_product("bnqt,bntk->bnqk", dscores, k) * scale).astype(query.dtype)

    zeros = jnp.zeros_like(rearrange(k, "b n t k -> b n k t"), jnp.float32)
    # A query that pads the last chunk has zeros for everything, its gradient included, and so adds nothing.
    parts = tuple(_split(x) for x in (_rows(query), _rows(out_gradient), lse, shift))
    (dkey, dvalue), dquery = jax.lax.scan(chunk, (zeros, zeros), parts)
    dkey, dvalue = (rearrange(x, "b n k t -> b t n k") for x in (dkey * scale, dvalue))
    return _tokens(_join(dquery), query.shape[1]), dkey.astype(key.dtype), dvalue.astype(value.dtype)


def _product(axes: str, x: Array, y: Array) -> Float32[Array, "..."]:
    return jnp.einsum(axes, x, y, precision=precision_of(x, y), preferred_element_type=jnp.float32)


def _split(x: Shaped[Array, "b n s ..."]) -> Shaped[Array, "i b n q ..."]:
    """Equal chunks of the queries, at most `QUERY_CHUNK` long, the last one padded with zeros."""
    length = x.shape[2]
    chunks = -(-length // QUERY_CHUNK)
    size = -(-length // chunks)
    return rearrange(_pad(x, chunks * size), "b n (i q) ... -> i b n q ...", i=chunks)


def _join(x: Shaped[Array, "i b n q ..."]) -> Shaped[Array, "b n u ..."]:
    return rearrange(x, "i b n q ... -> b n (i q) ...")


CHUNKED = Kernel(chunked_forward, chunked_backward)


# Splash attention, JAX's Pallas kernel for TPUs. Its public function keeps `lse` and its backward pass to itself.

_UNMASKED = MaskInfo(None, None, None, None, None)
_MASKED_SCORE = splash.DEFAULT_MASK_VALUE


def splash_forward(query: Queries, key: Keys, value: Keys, *, interpret: bool = False) -> tuple[Queries, LogSum]:
    """`interpret` runs the kernel on any platform, slowly: for tests."""
    queries, keys = query.shape[1], key.shape[1]
    sizes, padded_queries, padded_keys = splash_blocks(queries, keys)
    kernel = splash.SplashAttentionKernel(
        _UNMASKED,
        None,
        None,
        is_mqa=False,
        block_sizes=sizes,
        save_residuals=True,
        mask_value=_MASKED_SCORE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )
    segments = _segments(keys, padded_queries, padded_keys)
    q, k, v = _rows(_scaled(query), padded_queries), _rows(key, padded_keys), _rows(value, padded_keys)
    out, (lse,) = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)
    return _tokens(out, queries), lse[:, :, :queries]


def splash_backward(
    query: Queries,
    key: Keys,
    value: Keys,
    out: Queries,
    lse: LogSum,
    out_gradient: Queries,
    *,
    interpret: bool = False,
) -> tuple[Queries, Keys, Keys]:
    queries, keys = query.shape[1], key.shape[1]
    sizes, padded_queries, padded_keys = splash_blocks(queries, keys)
    segments = _segments(keys, padded_queries, padded_keys)

    def kernel(q: Array, k: Array, v: Array, out: Array, lse: Array, dout: Array) -> tuple[Array, ...]:
        saved = (q, k, v, segments, None, out, lse, _UNMASKED, _UNMASKED)
        settings = (False, _MASKED_SCORE, False, sizes, None, None, None, interpret)  # as in splash_forward
        return splash._splash_attention_bwd(*settings, saved, dout)[3:6]

    # A query that pads has a gradient of zero, and so adds nothing to those of keys and values.
    q, out, dout = (_rows(x, padded_queries) for x in (_scaled(query), out, out_gradient))
    k, v = _rows(key, padded_keys), _rows(value, padded_keys)
    dq, dk, dv = jax.vmap(kernel)(q, k, v, out, _pad(lse, padded_queries), dout)
    return _scaled(_tokens(dq, queries)), _tokens(dk, keys), _tokens(dv, keys)


SPLASH = Kernel(splash_forward, splash_backward)


def splash_blocks(queries: int, keys: int) -> tuple[splash.BlockSizes, int, int]:
    """Block sizes for that many tokens, and the numbers of queries and keys that they want, made up by padding.

    A kernel reads all keys once per block of queries (for the gradients of the keys: all queries once per block of
    keys), so that its arithmetic per byte of HBM is about the length of that block. 1024 is above what any TPU from v4
    to tpu7x needs to keep its matrix units busy (v6e, the hungriest, 560). Scores live in VMEM as float32, 1024 x 512
    at a time. The gradients come from two kernels and not from the fused one, which keeps the gradients of the queries
    once per block of keys: quadratic in length.
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


def _segments(keys: int, padded_queries: int, padded_keys: int) -> splash.SegmentIds | None:
    """What keeps queries from padded keys: tokens meet within a segment only, and padded keys have one of their own."""
    if keys == padded_keys:
        return None
    padding = jnp.arange(padded_keys) >= keys
    return splash.SegmentIds(jnp.zeros(padded_queries, jnp.int32), padding.astype(jnp.int32))


def _scaled(x: Float[Array, "b s n k"]) -> Float[Array, "b s n k"]:
    """Splash does not scale scores: queries come scaled and rounded once more to their dtype, and so do gradients."""
    return (x.astype(jnp.float32) * x.shape[-1] ** -0.5).astype(x.dtype)


# cuDNN's flash attention, below `jax.nn.dot_product_attention`, which rounds `lse` to the dtype of the queries.


def cudnn_forward(query: Queries, key: Keys, value: Keys) -> tuple[Queries, LogSum]:
    scale = query.shape[-1] ** -0.5
    return cudnn.dot_product_attention(query, key, value, scale=scale, return_residual=True)  # pyright: ignore


def cudnn_backward(
    query: Queries, key: Keys, value: Keys, out: Queries, lse: LogSum, out_gradient: Queries
) -> tuple[Queries, Keys, Keys]:
    absent = (jnp.zeros(0, query.dtype),) * 7  # bias, lengths, offsets, page tables
    settings: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.MaskType.NO_MASK,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    if jax.__version_info__ >= (0, 12):
        settings["score_mod"] = None
    operands = (query, key, value, *absent, lse, out, out_gradient)
    return tuple(cudnn._dot_product_attention_bwd_p_wrapper.bind(*operands, **settings))


CUDNN = Kernel(cudnn_forward, cudnn_backward)
