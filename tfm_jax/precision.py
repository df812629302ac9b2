"""The precision of matrix products and convolutions on accelerators, chosen from the dtype of the operands.

By default, JAX rounds float32 operands before it multiplies them: from 24 significant bits to 8 (bfloat16) on TPUs, and
to 11 (TF32) on NVIDIA GPUs since Ampere. CPUs do not round. With the exceptions below, all matrix products and
convolutions in this package therefore set their precision explicitly, and JAX uses the same for their gradients:

| operands | precision | on a TPU | on an NVIDIA GPU |
|---|---|---|---|
| float32 | HIGHEST | six bfloat16 passes, which together give float32 | float32 units, no TF32 |
| bfloat16, float16 | DEFAULT | one pass: exact products | tensor cores: exact products |

HIGH would not give float32 on every platform: it means three bfloat16 passes on TPUs, but TF32 on GPUs.

| products in | operands | cost of HIGHEST relative to DEFAULT, estimated from peak rates |
|---|---|---|
| the time embedding | float32 in every model | negligible: one row per clip |
| the autoencoder | float32 | up to 6 times the time on TPUs, 8 on A100, 7 on H100 |
| transformer, adapters and text encoder in float32 | float32 | the same |
| transformer, adapters and text encoder in bfloat16 | bfloat16 | none: they use DEFAULT |

The autoencoder pays this cost once per clip, when latents are prepared or a sample is decoded; training steps do not
run the autoencoder. On TPUs, a convolution at HIGHEST also needs more temporary memory. Compiled for v5e, for example,
a convolution with 96 channels on four frames of 480 x 832 takes 2.8 GiB instead of 1.4 GiB.

Three parts of the package do not use `precision_of`:

- The geometry of TFM (`tfm_jax.objective.temporal`) has no matrix products: it computes inner products elementwise, and
  solves small linear systems with JAX's solver, which has no precision setting.
- The attention kernels for TPUs (splash) and for GPUs (cuDNN) set their own precision, so they receive only
  bfloat16 or float16 (`tfm_jax.wan.attention`).
- Muon, the optimizer in `tfm_jax.moving_shapes.pretraining`, orthogonalises with optax's Newton-Schulz iteration at
  JAX's default precision. A rough result suffices: the authors of Muon run the iteration in bfloat16 (Jordan et al.
  2024).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def precision_of(*operands: Float[Array, "..."]) -> jax.lax.Precision:
    """Return the precision for a product: HIGHEST if JAX promotes the operands to float32 or wider, else DEFAULT."""
    exact = jnp.finfo(jnp.result_type(*operands)).bits > 16
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
