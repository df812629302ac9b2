"""Kernels in int8, for a frozen base in half the memory of bfloat16.

Each kernel `[in, out]` of the transformer's blocks is stored as integers q from -127 to 127, and one float32 scale s for
each output channel: the weight is q x s, with s = max |weight| / 127 over the inputs of the channel. A linear layer
multiplies by q in the dtype of the computation, in which the integers are exact, and scales the product by s.
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
