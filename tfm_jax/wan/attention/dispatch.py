"""Attention on one device, computed by the kernel that suits the platform.

- `SPLASH` on TPUs, for bfloat16 and float16. The compiler does not partition Pallas calls, so with more than one chip
  `attention` must be called through `tfm_jax.sharding.per_device`; otherwise lowering raises NotImplementedError.
- `CUDNN` on NVIDIA GPUs, for bfloat16 and float16, if cuDNN supports the shapes (`cudnn.supports`). JAX's cuDNN
  primitives tell the compiler how to partition batch and heads, so they need no `shard_map`.
- `CHUNKED` in all other cases. These include float32 on every platform, because cuDNN has no float32 attention and
  splash would round float32 operands to bfloat16. `CHUNKED` is plain XLA, so the compiler partitions batch and heads
  without communication.

The kernel is selected when a program is lowered, not when it is traced, and the selection does not depend on the
devices of the machine that lowers the program. A program can therefore be compiled for TPUs or GPUs on a machine that
has neither.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from tfm_jax.wan.attention import cudnn
from tfm_jax.wan.attention.chunked import CHUNKED
from tfm_jax.wan.attention.cudnn import CUDNN
from tfm_jax.wan.attention.kernel import Kernel, Keys, LogSumExp, Queries
from tfm_jax.wan.attention.splash import SPLASH

ATTENTION_OUTPUT = "attention_output"
"""Checkpoint name of `out` and `lse`. A remat policy that saves this name avoids a second forward pass of attention."""

KERNEL_SCOPE = "attention_kernel"
"""Named scope of everything that a kernel computes, in profiles and for `tfm_jax.planning.roofline`."""


@jax.custom_vjp
def attention(query: Queries, key: Keys, value: Keys) -> Queries:
    """Compute exact softmax attention with `n` heads of width `k` and no mask; scores and softmax are in float32.

    Memory grows linearly with `s` and `t` in both the forward and the backward pass.
    """
    return forward(query, key, value)[0]


def forward(query: Queries, key: Keys, value: Keys) -> tuple[Queries, LogSumExp]:
    """Compute `out` and `lse` with the kernel for the platform that the program is lowered for."""
    branches = {platform: kernel.forward for platform, kernel in _platform_kernels(query, key).items()}
    with jax.named_scope(KERNEL_SCOPE):
        return jax.lax.platform_dependent(query, key, value, default=CHUNKED.forward, **branches)


def backward(
    query: Queries, key: Keys, value: Keys, out: Queries, lse: LogSumExp, out_gradient: Queries
) -> tuple[Queries, Keys, Keys]:
    """Compute the gradients of query, key and value with the kernel for the same platform."""
    branches = {platform: kernel.backward for platform, kernel in _platform_kernels(query, key).items()}
    args = (query, key, value, out, lse, out_gradient)
    with jax.named_scope(KERNEL_SCOPE):
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
    out, lse = save_output(*forward(query, key, value))
    return out, (query, key, value, out, lse)


def save_output(out: Queries, lse: LogSumExp) -> tuple[Queries, LogSumExp]:
    """Name `out` and `lse`, so that a remat policy can save them.

    The names are given outside `platform_dependent`, because a remat policy does not see names inside it. `out` is
    saved with all heads in one axis, as TPUs have it in memory, because they would copy it otherwise.
    """
    flat = checkpoint_name(rearrange(out, "b s n k -> b s (n k)"), ATTENTION_OUTPUT)
    return rearrange(flat, "b s (n k) -> b s n k", n=out.shape[2]), checkpoint_name(lse, ATTENTION_OUTPUT)


def _attention_bwd(
    residuals: tuple[Array, Array, Array, Array, Array], out_gradient: Queries
) -> tuple[Queries, Keys, Keys]:
    return backward(*residuals, out_gradient)


attention.defvjp(_attention_fwd, _attention_bwd)
