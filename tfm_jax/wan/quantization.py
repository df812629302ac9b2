"""Kernels in int8: a frozen base in half the memory of bfloat16.

A kernel `[in, out]` is stored as integers q from -127 to 127 and a float32 scale s for each output channel. The weights
are q * s, where s is the largest absolute weight of the channel / 127. A linear layer multiplies by q in the dtype of
the computation, in which these integers are exact, and multiplies the product by s.

Qwix, Google's quantisation library for JAX, does not fit. While a module runs for the first time, it intercepts matrix
products, traces their operands back to the variables of the module, and replaces these. It cannot trace a kernel past
the custom gradient of our product, nor replace variables in the body of a scan over stacked layers.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from tfm_jax.wan.layers import Linear


def quantize(weight: Float[Array, "... i o"]) -> tuple[Int8[Array, "... i o"], Float[Array, "... o"]]:
    """Return the nearest integers and the scales. The scale of a channel is not finite if one of its weights is not."""
    scale = jnp.max(jnp.abs(weight), axis=-2) / 127
    step = jnp.where(scale > 0, scale, 1)  # all weights of a channel may be 0
    return jnp.round(weight / step[..., None, :]).astype(jnp.int8), scale


def quantize_linears(module: nnx.Module) -> nnx.Module:
    """Quantise the kernels of all linear layers in `module`, and return it. `nnx.eval_shape` does it to shapes only."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, Linear):
            *layers, _, axis_out = layer.kernel.get_metadata()["axes"]
            kernel, scale = quantize(layer.kernel[...].astype(jnp.float32))
            layer.kernel.set_value(kernel)
            layer.kernel_scale = nnx.Param(scale, axes=(*layers, axis_out))
    return module
