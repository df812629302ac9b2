"""The Pallas calls of splash attention: JAX's kernels for TPUs, on grids of our own.

JAX's own calls do not suffice: those of the backward pass use one of the two cores of v4 and v5p, because heads may
share keys there; a call that returns `lse` has no gradient; and the gradients of the others do not accept an `lse` over
more keys (which `sharded.ring` needs). In the calls below, every head has its own keys. The first dimension of each
grid is the heads, which are declared parallel, so that the compiler splits them over the cores.

No other module uses JAX's splash, and tests/test_private_apis.py checks what is used here against the installed JAX.

The axes are x: the heads of all videos, u: queries, t: keys, k: head width. All tokens are padded to whole blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jaxtyping import Array, Bool, Float, Float32, Int32

Queries = Float[Array, "x u k"]
Keys = Float[Array, "x t k"]
RowSums = Float32[Array, "x u"]
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


def forward(
    q: Queries, k: Keys, v: Keys, is_padding: Bool[Array, " t"] | None, blocks: Blocks, interpret: Interpret
) -> tuple[Queries, RowSums]:
    """Compute the output and the log-sum-exp of the scores, which are not scaled. Keys that are padding are masked."""
    (heads, queries, width), steps = q.shape, k.shape[1] // blocks.keys

    def kernel(*refs: Any) -> None:
        q, k, v, q_ids, k_ids, out, lse, lanes, largest, total, sums = refs
        splash.flash_attention_kernel(
            *_NO_TABLES, q, k, v, q_ids, k_ids, None, None, None, largest, total, sums, out, lanes, grid_width=steps,
            bq=blocks.queries, bkv=blocks.keys, bkv_compute=blocks.compute, head_dim_v=width, **_SETTINGS
        )  # fmt: skip

        @pl.when(pl.program_id(2) == steps - 1)
        def _() -> None:
            lse[...] = lanes[...].T[:1]  # all lanes are equal

    of_queries, of_keys = _outer(blocks.queries, width), _inner(blocks.keys, width)
    out, lse = _call(
        kernel,
        "splash_mha_fwd",
        (heads, queries // blocks.queries, steps),
        [(q, of_queries), (k, of_keys), (v, of_keys), *_ids(is_padding, blocks)],
        [
            (jax.ShapeDtypeStruct.like(q), of_queries),
            (jax.ShapeDtypeStruct((heads, 1, queries), jnp.float32), _outer_row(blocks.queries)),
        ],
        [*[(blocks.queries, LANES)] * 3, (blocks.queries, width)],
        interpret,
    )
    return out, lse[:, 0]


def query_gradients(
    q: Queries, k: Keys, v: Keys, is_padding: Bool[Array, " t"] | None, lse: RowSums, dout: Queries, shift: RowSums,
    blocks: Blocks, interpret: Interpret
) -> Queries:  # fmt: skip
    """Compute the gradients of the queries. `shift` is the sum of output x its gradient; `compute` must be `keys`."""
    (heads, queries, width), steps = q.shape, k.shape[1] // blocks.keys

    def kernel(*refs: Any) -> None:
        q, k, v, q_ids, k_ids, lse, dout, shift, dq, sums = refs
        splash._flash_attention_dq_kernel(
            *_NO_TABLES, q, k, v, q_ids, k_ids, None, lse, dout, shift, None, None, sums, dq, grid_width=steps,
            bq=blocks.queries, bkv=blocks.keys, **_SETTINGS
        )  # fmt: skip

    of_queries, of_keys = _outer(blocks.queries, width), _inner(blocks.keys, width)
    of_rows = _outer_row(blocks.queries)
    (dq,) = _call(
        kernel,
        "splash_mha_dq",
        (heads, queries // blocks.queries, steps),
        [
            *[(q, of_queries), (k, of_keys), (v, of_keys), *_ids(is_padding, blocks)],
            *[(lse[:, None], of_rows), (dout, of_queries), (shift[:, None], of_rows)],
        ],
        [(jax.ShapeDtypeStruct.like(q), of_queries)],
        [(blocks.queries, width)],
        interpret,
    )
    return dq


def key_gradients(
    q: Queries, k: Keys, v: Keys, lse: RowSums, dout: Queries, shift: RowSums, blocks: Blocks, interpret: Interpret
) -> tuple[Keys, Keys]:
    """Compute the gradients of keys and values. Those of padded keys are arbitrary; padded queries must have none."""
    (heads, _, width), steps = q.shape, q.shape[1] // blocks.queries

    def kernel(*refs: Any) -> None:
        q, k, v, lse, dout, shift, dk, dv, dk_sums, dv_sums = refs
        splash._flash_attention_dkv_kernel(
            *_NO_TABLES, q, k, v, None, None, None, lse, dout, shift, None, None, None, dk_sums, dv_sums, None,
            dk, dv, num_q_heads=heads, num_kv_heads=heads, is_mqa=False, grid_width=steps,
            bq=blocks.queries, bkv=blocks.keys, bkv_compute=blocks.compute, **_SETTINGS
        )  # fmt: skip

    of_queries, of_keys = _inner(blocks.queries, width), _outer(blocks.keys, width)
    of_rows = _inner_row(blocks.queries)
    dk, dv = _call(
        kernel,
        "splash_mha_dkv",
        (heads, k.shape[1] // blocks.keys, steps),
        [
            *[(q, of_queries), (k, of_keys), (v, of_keys)],
            *[(lse[:, None], of_rows), (dout, of_queries), (shift[:, None], of_rows)],
        ],
        [(jax.ShapeDtypeStruct.like(k), of_keys), (jax.ShapeDtypeStruct.like(v), of_keys)],
        [(blocks.keys, width), (blocks.keys, width)],
        interpret,
    )
    return dk, dv


def _call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    inputs: Sequence[tuple[Array | None, pl.BlockSpec | None]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Sequence[tuple[int, int]],
    interpret: Interpret,
) -> Sequence[Array]:
    """Run a kernel over a grid of heads x outer blocks x inner blocks, with float32 arrays in VMEM as `scratch`."""
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name=name,
        interpret=interpret,
    )
    return call(*(array for array, _ in inputs))


def _outer(tokens: int, width: int) -> pl.BlockSpec:
    """The block of the second dimension of the grid."""
    return pl.BlockSpec((None, tokens, width), lambda head, outer, inner: (head, outer, 0))


def _inner(tokens: int, width: int) -> pl.BlockSpec:
    """The block of the third dimension of the grid."""
    return pl.BlockSpec((None, tokens, width), lambda head, outer, inner: (head, inner, 0))


def _outer_row(tokens: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, 1, tokens), lambda head, outer, inner: (head, 0, outer))


def _inner_row(tokens: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, 1, tokens), lambda head, outer, inner: (head, 0, inner))


def _ids(
    is_padding: Bool[Array, " t"] | None, blocks: Blocks
) -> list[tuple[Int32[Array, "..."] | None, pl.BlockSpec | None]]:
    """Return the segments of queries and keys: queries attend to keys in their own segment, which excludes padding."""
    if is_padding is None:
        return [(None, None), (None, None)]
    k_ids = jnp.broadcast_to(is_padding.astype(jnp.int32), (SUBLANES, *is_padding.shape))
    return [
        (jnp.zeros((blocks.queries, LANES), jnp.int32), pl.BlockSpec((blocks.queries, LANES), lambda *_: (0, 0))),
        (k_ids, pl.BlockSpec((SUBLANES, blocks.keys), lambda head, outer, inner: (0, inner))),
    ]
