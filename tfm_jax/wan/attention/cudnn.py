"""cuDNN's flash attention for NVIDIA GPUs.

This module uses the private primitives behind `jax.nn.dot_product_attention`, because the public function does not
suffice: it rounds `lse` to the dtype of the queries, its backward pass does not accept an `lse` over more keys (which
`sharded.ring` needs), and it can be traced only on a machine with cuDNN. No other module uses these primitives, and
tests/test_private_apis.py checks them against the installed JAX.

Tracing and lowering need no GPU. To run a program, JAX needs a cuDNN at least as new as the one that JAX was built
against. If cuDNN rejects a call that `supports` accepts, compilation fails; there is no fallback to another kernel.
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
    """Return empty arrays for the unused operands: the bias, two lengths, two offsets and two page tables."""
    return (jnp.zeros(0, query.dtype),) * 7


def settings(query: Queries) -> dict[str, Any]:
    """Return the parameters that both primitives take, for softmax attention without mask, bias or dropout."""
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
