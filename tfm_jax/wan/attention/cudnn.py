"""cuDNN's flash attention for NVIDIA GPUs.

The primitives under `jax.nn.dot_product_attention` are private, but the public function is no substitute: it rounds
`lse` to the dtype of the queries, its backward pass does not accept an `lse` over more keys (`sharded.ring` needs one),
and it can only be traced where cuDNN is installed. This is the only module that uses them, and
tests/test_private_apis.py checks them against the installed JAX.

Tracing and lowering need no GPU. Where a program runs, JAX does not start its CUDA backend with a cuDNN older than the
one it was built against, and compiling fails if cuDNN does not support a call; no other kernel replaces it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as stablehlo

from tfm_jax.wan.attention.kernel import Kernel, Keys, LogSumExp, Queries


def supports(query: Queries, key: Keys) -> bool:
    """Whether cuDNN can train with these shapes: even numbers of tokens, and a head width of 8, 16, ..., 128."""
    width = query.shape[-1]
    return width <= 128 and width % 8 == 0 and query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0


def cudnn_forward(query: Queries, key: Keys, value: Keys) -> tuple[Queries, LogSumExp]:
    operands = (query, key, value, *unused_operands(query))
    primitive = stablehlo._dot_product_attention_fwd_p_wrapper
    return tuple(primitive.bind(*operands, is_training=True, **settings(query)))


def cudnn_backward(
    query: Queries, key: Keys, value: Keys, out: Queries, lse: LogSumExp, out_gradient: Queries
) -> tuple[Queries, Keys, Keys]:
    operands = (query, key, value, *unused_operands(query), lse, out, out_gradient)
    return tuple(stablehlo._dot_product_attention_bwd_p_wrapper.bind(*operands, **settings(query)))


CUDNN = Kernel(cudnn_forward, cudnn_backward)


def unused_operands(query: Queries) -> tuple[jax.Array, ...]:
    """Empty arrays in place of the bias, two lengths, two offsets and two page tables, which attention does not use."""
    return (jnp.zeros(0, query.dtype),) * 7


def settings(query: Queries) -> dict[str, Any]:
    """The parameters that both primitives take: softmax attention without mask, bias or dropout."""
    values: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": stablehlo.MaskType.NO_MASK,
        "layout": stablehlo.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    if jax.__version_info__ >= (0, 12):
        values["score_mod"] = None
    return values
