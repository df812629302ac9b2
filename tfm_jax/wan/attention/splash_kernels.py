"""The Pallas calls of splash attention: JAX's kernels for TPUs, on grids of our own.

JAX's own calls do not suffice. A call that returns `lse` has no gradient, and the gradients of the others do not accept
an `lse` over more keys (which `sharded.ring` needs). The backward pass lets heads share keys, and therefore uses one of
the two cores of v4 and v5p. Either it computes all scores twice, or it writes a part of the gradients of the queries
for each block of keys, so that its memory is quadratic in the number of tokens.

In the calls below, every head has its own keys. The first dimension of each grid is the heads, which are declared
parallel, so that the compiler splits them over the cores. Of each grid, `outer` and `inner` are the other dimensions.

No other module uses JAX's splash, and tests/test_private_apis.py checks what is used here against the installed JAX.

The axes are r: rows, each of which has all tokens of some heads; m: the channels of these heads, in the order of the
heads; x: the heads of all rows; s: queries, and t: keys. A block has the channels of one head. The compiler accepts
that if they fill whole lanes, or if a row has no other heads. The last block of tokens may extend beyond the end of an
array. What is written there is lost; what is read there can be anything, even NaN, so it is set to zero in VMEM.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.lax import div, rem
from jaxtyping import Array, Float, Float32, Int32

Queries = Float[Array, "r s m"]
Keys = Float[Array, "r t m"]
RowSums = Float32[Array, "x s"]
Interpret = bool | pltpu.InterpretParams
"""Whether to emulate a kernel on any platform, and how."""

LANES, SUBLANES = 128, 8

_LAYOUT = splash.QKVLayout.HEAD_DIM_MINOR
_SETTINGS: dict[str, Any] = {
    "mask_value": splash.DEFAULT_MASK_VALUE,
    "mask_function": None,
    "attn_logits_soft_cap": None,
    "q_layout": _LAYOUT,
    "k_layout": _LAYOUT,
    "v_layout": _LAYOUT,
}
_NO_TABLES = (None, None, None)
"""Stands for the tables of a mask, which the kernels would read for each block."""


class Blocks(NamedTuple):
    """The number of tokens in a block."""

    queries: int
    keys: int
    compute: int
    """Keys whose scores are in VMEM at a time; divides `keys`."""


def forward(q: Queries, k: Keys, v: Keys, heads: int, blocks: Blocks, interpret: Interpret) -> tuple[Queries, RowSums]:
    """Compute the output and the log-sum-exp of the scores, which are not scaled.

    Args:
        heads: number of heads in a row.
    """
    (rows, queries, channels), keys = q.shape, k.shape[1]
    width = channels // heads
    of_queries, of_keys = _outer(blocks.queries, width, heads), _inner(blocks.keys, width, heads)
    of_lse = pl.BlockSpec((None, 1, blocks.queries), lambda head, outer, inner: (head, 0, outer))
    lse_shape = jax.ShapeDtypeStruct((rows * heads, 1, queries), jnp.float32)
    row = pltpu.VMEM((blocks.queries, LANES), jnp.float32)
    out, lse = _call(
        partial(_forward_kernel, keys=keys, compute=blocks.compute),
        "splash_mha_fwd",
        (rows * heads, pl.cdiv(queries, blocks.queries), pl.cdiv(keys, blocks.keys)),
        [(q, of_queries), (k, of_keys), (v, of_keys), *_segments(keys, blocks, keys_in_lanes=True)],
        [(jax.ShapeDtypeStruct.like(q), of_queries), (lse_shape, of_lse)],
        [row, row, row, pltpu.VMEM((blocks.queries, width), jnp.float32)],
        interpret,
    )
    return out, lse[:, 0]


def _forward_kernel(*refs: Any, keys: int, compute: int) -> None:
    q, k, v, q_ids, k_ids, out, lse, lanes, largest, total, sums = refs
    steps = int(pl.num_programs(2))
    _clear_beyond(keys, pl.program_id(2), v)
    splash.flash_attention_kernel(
        *_NO_TABLES, q, k, v, q_ids, k_ids, None, None, None, largest, total, sums, out, lanes,
        grid_width=steps, bq=q.shape[0], bkv=k.shape[0], bkv_compute=compute, head_dim_v=v.shape[1], **_SETTINGS
    )  # fmt: skip

    @pl.when(pl.program_id(2) == steps - 1)
    def _() -> None:
        lse[...] = lanes[...].T[:1]  # all lanes are equal


def backward(
    q: Queries, k: Keys, v: Keys, out: Queries, lse: RowSums, dout: Queries, heads: int, blocks: Blocks,
    interpret: Interpret
) -> tuple[Float32[Array, "r s m"], Keys, Keys]:  # fmt: skip
    """Compute the gradients of queries, keys and values.

    For each block of keys, the kernel goes through all blocks of queries. The gradients of the keys are summed in VMEM,
    and those of the queries, in float32, in HBM.
    """
    (rows, queries, channels), keys = q.shape, k.shape[1]
    width = channels // heads
    grid = rows * heads, pl.cdiv(keys, blocks.keys), pl.cdiv(queries, blocks.queries)
    padded = grid[2] * blocks.queries
    of_queries, of_keys = _inner(blocks.queries, width, heads), _outer(blocks.keys, width, heads)
    of_rows = pl.BlockSpec((None, 1, blocks.queries), lambda head, outer, inner: (head, 0, inner))
    block_of_dq = pltpu.VMEM((blocks.queries, width), jnp.float32)
    block_of_dk = pltpu.VMEM((blocks.keys, width), jnp.float32)
    dq, dk, dv = _call(
        partial(_backward_kernel, heads=heads, queries=queries, keys=keys, compute=blocks.compute),
        "splash_mha_bwd",
        grid,
        [
            *[(q, of_queries), (k, of_keys), (v, of_keys), *_segments(keys, blocks, keys_in_lanes=False)],
            *[(jnp.pad(lse, ((0, 0), (0, padded - queries)))[:, None], of_rows), (out, of_queries), (dout, of_queries)],
        ],
        [
            (jax.ShapeDtypeStruct((rows, padded, channels), jnp.float32), pl.BlockSpec(memory_space=pltpu.HBM)),
            (jax.ShapeDtypeStruct.like(k), of_keys),
            (jax.ShapeDtypeStruct.like(v), of_keys),
        ],
        [
            *[pltpu.VMEM((SUBLANES, blocks.queries), jnp.float32), block_of_dq, block_of_dk, block_of_dk],
            *[*[block_of_dq] * 3, *[pltpu.SemaphoreType.DMA] * 2],
        ],
        interpret,
    )
    return dq[:, :queries], dk, dv


def _backward_kernel(*refs: Any, heads: int, queries: int, keys: int, compute: int) -> None:
    """Add to the gradients of one block of keys, and to those of one block of queries, which are in HBM.

    A step fetches the sum of the previous blocks of keys while it computes its own part, and stores the new sum while
    the next step computes.
    """
    q, k, v, q_ids, k_ids, lse, out, dout, dq, dk, dv, *scratch = refs
    shift, dq_sums, dk_sums, dv_sums, part, before, after, fetched, stored = scratch
    head, outer, inner = (pl.program_id(axis) for axis in range(3))
    outers, inners = (int(pl.num_programs(axis)) for axis in (1, 2))
    size, width = q.shape
    row, place = div(head, heads), rem(head, heads)
    block = dq.at[row, pl.ds(inner * size, size), pl.ds(place * width, width)]
    _clear_beyond(keys, outer, k, v)
    _clear_beyond(queries, inner, q, out, dout)
    fetch, store = pltpu.make_async_copy(block, before, fetched), pltpu.make_async_copy(after, block, stored)

    pl.when(outer > 0)(fetch.start)
    # The sum of output x its gradient for each query, as a product, because that has the queries in its lanes.
    both = out[...].astype(jnp.float32) * dout[...].astype(jnp.float32)
    ones, channels = jnp.ones((SUBLANES, width), jnp.float32), (((1,), (1,)), ((), ()))
    shift[...] = jax.lax.dot_general(ones, both, channels, precision=jax.lax.Precision.HIGHEST)
    splash._flash_attention_dkv_kernel(
        *_NO_TABLES, q, k, v, q_ids, k_ids, None, lse, dout, shift, None, None, dq_sums, dk_sums, dv_sums, part, dk, dv,
        num_q_heads=1, num_kv_heads=1, is_mqa=False, grid_width=inners, bq=size, bkv=k.shape[0],
        bkv_compute=compute, **_SETTINGS
    )  # fmt: skip
    pl.when(outer > 0)(fetch.wait)
    # The next step waits for a store, unless it belongs to another head or fetches the same block.
    pl.when((inners > 1) & (outer + inner > 0))(store.wait)
    after[...] = part[...] + jnp.where(outer > 0, before[...], 0.0)
    store.start()
    pl.when((inners == 1) | ((outer == outers - 1) & (inner == inners - 1)))(store.wait)


def _clear_beyond(tokens: int, block: Array, *refs: Any) -> None:
    """Set the rows of a block that are beyond the last token to zero."""
    size, width = refs[0].shape
    if tokens % size == 0:
        return

    @pl.when(block == tokens // size)
    def _() -> None:
        exists = jax.lax.broadcasted_iota(jnp.int32, (size, width), 0) < tokens % size
        for ref in refs:
            ref[...] = jnp.where(exists, ref[...], 0)


def _call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    inputs: Sequence[tuple[Array | None, pl.BlockSpec | None]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Sequence[Any],
    interpret: Interpret,
) -> Sequence[Array]:
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name=name,
        interpret=interpret,
    )
    return call(*(array for array, _ in inputs))


def _outer(tokens: int, width: int, heads: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, tokens, width), lambda head, outer, inner: (div(head, heads), outer, rem(head, heads)))


def _inner(tokens: int, width: int, heads: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, tokens, width), lambda head, outer, inner: (div(head, heads), inner, rem(head, heads)))


def _segments(
    keys: int, blocks: Blocks, *, keys_in_lanes: bool
) -> list[tuple[Int32[Array, "..."] | None, pl.BlockSpec | None]]:
    """Return the segments of queries and keys: queries attend to keys in their own segment, which exclude keys beyond
    the last one."""
    if keys % blocks.keys == 0:
        return [(None, None), (None, None)]
    ids = (jnp.arange(pl.cdiv(keys, blocks.keys) * blocks.keys) >= keys).astype(jnp.int32)
    if keys_in_lanes:
        queries, of_all = (blocks.queries, LANES), jnp.broadcast_to(ids, (SUBLANES, ids.size))
        of_keys = pl.BlockSpec((SUBLANES, blocks.keys), lambda head, outer, inner: (0, inner))
    else:
        queries, of_all = (SUBLANES, blocks.queries), jnp.broadcast_to(ids[:, None], (ids.size, LANES))
        of_keys = pl.BlockSpec((blocks.keys, LANES), lambda head, outer, inner: (outer, 0))
    return [
        (jnp.zeros(queries, jnp.int32), pl.BlockSpec(queries, lambda head, outer, inner: (0, 0))),
        (of_all, of_keys),
    ]
