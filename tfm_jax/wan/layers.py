"""Building blocks that the three Wan networks share: parameters with named axes, linear layers and norms.

A module can be built as a stack of identical layers: `stack=(30,)` adds a leading axis to every parameter, and
`jax.lax.scan` over the module passes one layer at a time to the body of the loop.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from tfm_jax.precision import precision_of
from tfm_jax.sharding import Axes, gather

LINEAR_OUTPUT = "linear_output"
"""Checkpoint name of what linear layers return and of what the first factor of their adapters returns. With these and
the outputs of attention saved, the backward pass repeats no matrix product."""

LORA_SCOPE = "lora"
"""Named scope of everything that an adapter computes, in profiles and for `tfm_jax.planning.roofline`."""


def param(
    key: jax.Array,
    shape: Sequence[int],
    axes: Axes,
    *,
    stack: tuple[int, ...] = (),
    dtype: DTypeLike,
    bound: float | None = None,
    variable_type: type[nnx.Variable] = nnx.Param,
) -> nnx.Variable:
    """Draw a parameter from uniform(-bound, bound). By default, bound is 1 / sqrt(product of shape[:-1]).

    Args:
        axes: logical names of the axes of `shape`, which `tfm_jax.sharding.RULES` maps to mesh axes.
        stack: lengths of the leading axes of stacked layers, such as `(30,)`; `()` for a single layer.
    """
    assert len(shape) == len(axes), (shape, axes)
    if bound is None:
        bound = 1 / math.sqrt(math.prod(shape[:-1]) or 1)
    value = jax.random.uniform(key, (*stack, *shape), jnp.float32, -bound, bound).astype(dtype)
    return variable_type(value, axes=("layers",) * len(stack) + tuple(axes))


def constant(
    value: float, shape: Sequence[int], axes: Axes, *, stack: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
) -> nnx.Param:
    """Create a parameter filled with `value`, for norm scales and biases. See `param` for the other arguments."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.full((*stack, *shape), value, dtype), axes=("layers",) * len(stack) + tuple(axes))


def gathered(variable: nnx.Variable, dtype: DTypeLike) -> Array:
    """Return a parameter of one layer in `dtype`, all-gathered along its `embed` axis.

    It is gathered in `dtype` or in its own, whichever is narrower.
    """
    value = variable[...]
    narrower = min(value.dtype, jnp.dtype(dtype), key=lambda kind: kind.itemsize)
    return gather(value.astype(narrower), variable.get_metadata()["axes"][-value.ndim :]).astype(dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`, plus a low-rank adapter if one is attached.

    `kernel` is `[in, out]`. If it is in int8, the output is multiplied by `kernel_scale` `[out]`: see
    `tfm_jax.wan.quantization`. `tfm_jax.lora.adapters` attaches an adapter by setting `lora_a` `[in, rank]`, `lora_b`
    `[rank, out]` and `lora_scale` = alpha / rank. The adapter of a DoRA (Liu et al. 2024, arXiv 2402.09353) also has
    `lora_magnitude` `[out]`, the norms of the columns of the kernel with the adapter. All parameters are used in the
    dtype of the input, except for scales and magnitudes; scales and those of an adapter are stored in float32.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        rngs: nnx.Rngs,
        axes: Axes = (None, None),
        bias: bool = True,
        stack: tuple[int, ...] = (),
        dtype: DTypeLike = jnp.float32,
    ):
        self.kernel = param(rngs.params(), (features_in, features_out), axes, stack=stack, dtype=dtype)
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.bias: nnx.Param | None = nnx.data(
            constant(0.0, (features_out,), axes[1:], stack=stack, dtype=dtype) if bias else None
        )
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.lora_magnitude: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 1.0

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = gathered(self.kernel, x.dtype)
        scale = None if self.kernel_scale is None else gathered(self.kernel_scale, jnp.float32)
        y = matmul(x, kernel)
        if scale is not None:
            y = (y * scale).astype(x.dtype)
        if self.bias is not None:
            y = y + gathered(self.bias, x.dtype)
        # Round here. Otherwise XLA may keep excess precision, and how much depends on whether there is an adapter.
        bits = jnp.finfo(x.dtype)
        y = jax.lax.reduce_precision(y, bits.nexp, bits.nmant)
        if self.lora_a is not None and self.lora_b is not None:
            with jax.named_scope(LORA_SCOPE):
                a, b = gathered(self.lora_a, x.dtype), gathered(self.lora_b, x.dtype)
                low = checkpoint_name(matmul(x, a), LINEAR_OUTPUT)
                y = y + matmul(low, b) * self.lora_scale
                if self.lora_magnitude is not None:
                    norms = column_norms(kernel, scale, matmul(a, b) * self.lora_scale)
                    y = self._rescale(y, gathered(self.lora_magnitude, jnp.float32), norms)
        return checkpoint_name(y, LINEAR_OUTPUT)

    def _rescale(self, y: Float[Array, "... o"], magnitude: Array, norms: Array) -> Float[Array, "... o"]:
        """Return the output of a DoRA, given the output `y` of the LoRA and the norms of its weights."""
        # The norms count as constants in the gradient (section 4.3 of the paper of DoRA), as in PEFT.
        y, norms = (checkpoint_name(value, LINEAR_OUTPUT) for value in (y, jax.lax.stop_gradient(norms)))
        product = y if self.bias is None else y - gathered(self.bias, y.dtype)
        return y + (product.astype(jnp.float32) * (magnitude / norms - 1)).astype(y.dtype)


def column_norms(
    kernel: Real[Array, "... i o"],
    scale: Float[Array, "... o"] | None,
    change: Float[Array, "... i o"] | float = 0,
) -> Float[Array, "... o"]:
    """Return the Euclidean norms of the columns of `kernel` x `scale` + `change`, in float32."""
    weight = kernel.astype(jnp.float32)
    if scale is not None:
        weight = weight * scale[..., None, :]
    return jnp.sqrt(jnp.sum(jnp.square(weight + change), axis=-2))


@jax.custom_vjp
def matmul(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """Return `x @ kernel`. XLA on a CPU computes the gradient below up to three times as fast as its own."""
    return jnp.matmul(x, kernel, precision=precision_of(x, kernel))


def _matmul_forward(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals: tuple[Array, Array], gradient: Float[Array, "... o"]) -> tuple[Array, Array]:
    """Multiply so that, of the two operands that share the tokens, only the narrower one has to be transposed."""
    x, kernel = residuals
    tokens = tuple(range(x.ndim - 1))
    precision = precision_of(x, kernel)

    def contract(left: Float[Array, "... i"], right: Float[Array, "... o"]) -> Float[Array, "i o"]:
        return jax.lax.dot_general(left, right, ((tokens, tokens), ((), ())), precision=precision)

    if x.shape[-1] <= gradient.shape[-1]:
        dkernel = contract(x, gradient)
    else:  # the barrier keeps XLA from swapping the operands to avoid the cheap transpose of the result
        dkernel = jax.lax.optimization_barrier(contract(gradient, x)).T
    return jnp.matmul(gradient, kernel.T, precision=precision), dkernel


matmul.defvjp(_matmul_forward, _matmul_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32 and returned in the dtype of the input."""

    def __init__(self, features: int, *, stack: tuple[int, ...] = (), eps: float = 1e-6):
        self.scale = constant(1.0, (features,), (None,), stack=stack)
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, with or without scale and bias. Computed and returned in float32."""

    def __init__(self, features: int, *, affine: bool, stack: tuple[int, ...] = (), eps: float = 1e-6):
        self.scale = nnx.data(constant(1.0, (features,), (None,), stack=stack) if affine else None)
        self.bias = nnx.data(constant(0.0, (features,), (None,), stack=stack) if affine else None)
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...] + self.bias[...]
        return y
