"""Attention on one device, computed by the kernel that suits the platform.

- `SPLASH` on TPU, for bfloat16 and float16. The compiler does not partition Pallas calls: with more than one chip,
  call `attention` through `tfm_jax.sharding.per_device`, otherwise lowering raises NotImplementedError.
- `CUDNN` on NVIDIA GPUs, for bfloat16 and float16, where cuDNN supports the shapes (`cudnn.supports`). It tells the
  compiler how to partition batch and heads, so it needs no `shard_map`.
- `CHUNKED` everywhere else, and for float32 on every platform: cuDNN has no float32 attention, and splash would
  multiply float32 as bfloat16. It is plain XLA, so batch and heads are partitioned without communication.

The kernel is selected when a program is lowered, not when it is traced, and nothing here depends on the devices of this
machine. A program can therefore be compiled for TPUs or GPUs on a machine that has neither.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from tfm_jax.wan.attention import cudnn
from tfm_jax.wan.attention.chunked import CHUNKED
from tfm_jax.wan.attention.cudnn import CUDNN
from tfm_jax.wan.attention.kernel import Kernel, Keys, LogSumExp, Queries
from tfm_jax.wan.attention.splash import SPLASH

ATTENTION_OUTPUT = "attention_output"
"""The checkpoint name of `out` and `lse`: a remat policy that saves it avoids a second forward pass of attention."""


@jax.custom_vjp
def attention(query: Queries, key: Keys, value: Keys) -> Queries:
    """Exact softmax attention with `n` heads of width `k` and no mask; scores and softmax are float32.

    Memory grows linearly in `s` and `t`, both in the forward and in the backward pass.
    """
    return forward(query, key, value)[0]


def forward(query: Queries, key: Keys, value: Keys) -> tuple[Queries, LogSumExp]:
    """Compute `out` and `lse` with the kernel of the platform for which the program is lowered."""
    branches = {platform: kernel.forward for platform, kernel in _platform_kernels(query, key).items()}
    return jax.lax.platform_dependent(query, key, value, default=CHUNKED.forward, **branches)


def backward(
    query: Queries, key: Keys, value: Keys, out: Queries, lse: LogSumExp, out_gradient: Queries
) -> tuple[Queries, Keys, Keys]:
    """Compute the gradients of query, key and value with the kernel of the platform."""
    branches = {platform: kernel.backward for platform, kernel in _platform_kernels(query, key).items()}
    args = (query, key, value, out, lse, out_gradient)
    return jax.lax.platform_dependent(*args, default=CHUNKED.backward, **branches)


def _platform_kernels(query: Queries, key: Keys) -> dict[str, Kernel]:
    """Map platforms to kernels; a platform that is missing uses `CHUNKED`."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return {}
    kernels = {"tpu": SPLASH}
    if cudnn.supports(query, key):
        kernels["cuda"] = CUDNN
    return kernels


def _attention_fwd(query: Queries, key: Keys, value: Keys) -> tuple[Queries, tuple[Array, Array, Array, Array, Array]]:
    # The names are outside of `platform_dependent` because a remat policy does not see inside it.
    out, lse = (checkpoint_name(x, ATTENTION_OUTPUT) for x in forward(query, key, value))
    return out, (query, key, value, out, lse)


def _attention_bwd(
    residuals: tuple[Array, Array, Array, Array, Array], out_gradient: Queries
) -> tuple[Queries, Keys, Keys]:
    return backward(*residuals, out_gradient)


attention.defvjp(_attention_fwd, _attention_bwd)
