"""The precision of matrix products and convolutions on accelerators, decided here by the dtype of the operands.

Without a `precision`, JAX rounds float32 operands before it multiplies them: from 24 significant bits to 8 (bfloat16)
on TPUs, and to 11 (TF32) on NVIDIA GPUs since Ampere. CPUs do not round. Every matrix product and every convolution of
this package therefore names its precision, and JAX gives its gradients the same one:

| operands | precision | on a TPU | on an NVIDIA GPU |
|---|---|---|---|
| float32 | HIGHEST | six bfloat16 passes, together float32 | float32 units, no TF32 |
| bfloat16, float16 | DEFAULT | one pass: exact products | tensor cores: exact products |

HIGH would not be float32 everywhere: it means three bfloat16 passes on TPUs, but TF32 on GPUs, for matrix products and
convolutions alike.

| products of | operands | cost of HIGHEST over DEFAULT, by peak rates |
|---|---|---|
| the time embedding | float32 in every model | negligible: one row per clip |
| the autoencoder | float32 | up to 6 times the time on TPUs, 8 on A100, 7 on H100 |
| transformer, adapters and text encoder in float32 | float32 | the same |
| transformer, adapters and text encoder in bfloat16 | bfloat16 | none: they stay at DEFAULT |

The autoencoder pays once per clip, when latents are prepared or a sample is decoded. The training step of a bfloat16
model does not run it. On TPUs a convolution at HIGHEST also needs more temporary memory: compiled for v5e, one of
96 channels on four frames of 480 x 832 takes 2.8 GiB instead of 1.4.

Three parts of the package multiply without `precision_of`:

- The geometry of TFM (`tfm_jax.objective.temporal`) has no matrix products. Its inner products are elementwise products
  and sums, and its small linear systems go to the solver of JAX, which has no precision to choose.
- The attention kernels for TPUs (splash) and for GPUs (cuDNN) choose their own precision inside, so they are given
  bfloat16 or float16 only (`tfm_jax.wan.attention`).
- Muon, the optimizer of `tfm_jax.moving_shapes.pretraining`, orthogonalises with optax's Newton-Schulz iteration at
  JAX's default precision. A rough result is enough for it, and its authors run it in bfloat16 (Jordan et al. 2024).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def precision_of(*operands: Float[Array, "..."]) -> jax.lax.Precision:
    """The `precision` for a matrix product or a convolution, from the dtype to which JAX promotes the operands."""
    exact = jnp.finfo(jnp.result_type(*operands)).bits > 16
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
