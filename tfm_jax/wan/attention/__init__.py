"""Exact attention without masks. Its memory grows linearly with the number of tokens.

- `dispatch.py` defines `attention` on one device and selects the kernel for the platform.
- `sharded.py` splits `attention` over a mesh.
- `chunked.py`, `splash.py` and `cudnn.py` hold one kernel each; `kernel.py` defines the interface of a kernel.
- `splash_kernels.py` runs the Pallas kernels of JAX for `splash.py`.
"""

from tfm_jax.wan.attention.dispatch import ATTENTION_OUTPUT, attention
from tfm_jax.wan.attention.sharded import cross_attention, self_attention

__all__ = ["ATTENTION_OUTPUT", "attention", "cross_attention", "self_attention"]
