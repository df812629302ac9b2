"""The layers of the Wan2.1 video autoencoder. They process a video chunk by chunk.

Layers that `run_layers` runs are called as `y, cache = layer(x, cache)` on a chunk `b t h w c`. The cache holds what
the layer needs from the frames before the chunk: the last input frames of its causal convolutions. The first chunk must
be exactly one frame, and its cache is `None`. Layers that need no earlier frames return `None` as their cache. The
result equals that of processing the whole video at once.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tfm_jax.precision import precision_of
from tfm_jax.wan.layers import Linear, constant, param

Chunk = Float[Array, "b t h w c"]
Output = Float[Array, "b t2 h2 w2 o"]
"""A chunk after a layer that may change every axis but the batch."""
Cache = Any
"""A pytree: None, an array of frames, or a tuple of caches."""


def run_layers(layers: Sequence[nnx.Module], x: Chunk, cache: Cache) -> tuple[Output, Cache]:
    """Apply the layers one after another. Their caches form the tuple `cache`."""
    caches = (None,) * len(layers) if cache is None else cache
    kept = []
    for layer, old in zip(layers, caches, strict=True):
        x, new = layer(x, old)
        kept.append(new)
    return x, tuple(kept)


class ChannelNorm(nnx.Module):
    """Scales the channel vector of every pixel to length sqrt(c), then multiplies it by gamma, all in float32."""

    def __init__(self, features: int, *, dtype: DTypeLike):
        self.gamma = constant(1.0, (features,), (None,), dtype=dtype)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        y = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True))
        y = y * (math.sqrt(x.shape[-1]) / jnp.maximum(length, 1e-12))
        return (y * self.gamma[...].astype(jnp.float32)).astype(x.dtype)


def convolve_frames(
    x: Float[Array, "n h w i"], kernel: Float[Array, "p q i o"], stride: int, padding: tuple[int, int]
) -> Float[Array, "n h2 w2 o"]:
    """Convolve every frame in 2-D, with the same `padding` (before, after) along height and width."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision_of(x, kernel),
    )


class Conv2d(nnx.Module):
    """A 3x3 convolution within each frame."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        stride: int = 1,
        padding: tuple[int, int] = (1, 1),
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.kernel = param(rngs.params(), (3, 3, features_in, features_out), (None,) * 4, dtype=dtype)
        self.bias = constant(0.0, (features_out,), (None,), dtype=dtype)
        self.stride = stride
        self.padding = padding

    def __call__(self, x: Chunk) -> Output:
        frames = rearrange(x, "b t h w c -> (b t) h w c")
        y = convolve_frames(frames, self.kernel[...], self.stride, self.padding) + self.bias[...]
        return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])


class CausalConv3d(nnx.Module):
    """A causal convolution over time, height and width: an output frame depends on no later input frame.

    The cache holds the last `size[0] - time_stride` frames before the chunk. Zeros precede the first chunk.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        size: tuple[int, int, int] = (3, 3, 3),
        time_stride: int = 1,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.kernel = param(rngs.params(), (*size, features_in, features_out), (None,) * 5, dtype=dtype)
        self.bias = constant(0.0, (features_out,), (None,), dtype=dtype)
        self.space_padding = (size[1] // 2, size[1] // 2)
        self.time_stride = time_stride
        self.cache_frames = size[0] - time_stride

    def empty_cache(self, x: Chunk) -> Float[Array, "b t2 h w c"]:
        """Return zeros to replace the missing frames before the first chunk `x`."""
        return jnp.zeros((x.shape[0], self.cache_frames, *x.shape[2:]), x.dtype)

    def __call__(self, x: Chunk, cache: Cache) -> tuple[Output, Cache]:
        x = jnp.concatenate([self.empty_cache(x) if cache is None else cache, x], axis=1)
        kernel = self.kernel[...]
        frames_out = (x.shape[1] - kernel.shape[0]) // self.time_stride + 1
        span = (frames_out - 1) * self.time_stride + 1
        # On CPU, one 2-D convolution per time step of the kernel is 1.5 to 5 times as fast as XLA's 3-D convolution.
        y = self.bias[...]
        for tap in range(kernel.shape[0]):
            frames = rearrange(x[:, tap : tap + span : self.time_stride], "b t h w c -> (b t) h w c")
            y = y + convolve_frames(frames, kernel[tap], 1, self.space_padding)
        return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0]), x[:, -self.cache_frames :]


class ResidualBlock(nnx.Module):
    """Norm, SiLU and causal convolution, twice, plus a shortcut (a linear layer if the number of channels changes)."""

    def __init__(self, features_in: int, features_out: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.norm1 = ChannelNorm(features_in, dtype=dtype)
        self.conv1 = CausalConv3d(features_in, features_out, rngs=rngs, dtype=dtype)
        self.norm2 = ChannelNorm(features_out, dtype=dtype)
        self.conv2 = CausalConv3d(features_out, features_out, rngs=rngs, dtype=dtype)
        self.shortcut = nnx.data(
            Linear(features_in, features_out, rngs=rngs, dtype=dtype) if features_in != features_out else None
        )

    def __call__(self, x: Chunk, cache: Cache) -> tuple[Float[Array, "b t h w o"], Cache]:
        before1, before2 = (None, None) if cache is None else cache
        y, after1 = self.conv1(jax.nn.silu(self.norm1(x)), before1)
        y, after2 = self.conv2(jax.nn.silu(self.norm2(y)), before2)
        return y + (x if self.shortcut is None else self.shortcut(x)), (after1, after2)


class AttentionBlock(nnx.Module):
    """Single-head self-attention among the pixels of a frame, one frame at a time to limit memory use."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.norm = ChannelNorm(features, dtype=dtype)
        self.to_qkv = Linear(features, 3 * features, rngs=rngs, dtype=dtype)
        self.proj = Linear(features, features, rngs=rngs, dtype=dtype)

    def __call__(self, x: Chunk, cache: Cache) -> tuple[Chunk, None]:
        del cache
        pixels = rearrange(self.norm(x), "b t h w c -> (b t) (h w) c")
        y = jax.lax.map(self._attend, self.to_qkv(pixels))
        return x + self.proj(y).reshape(x.shape), None

    @staticmethod
    def _attend(qkv: Float[Array, "n three_c"]) -> Float[Array, "n c"]:
        q, k, v = jnp.split(qkv, 3, axis=-1)
        precision = precision_of(q, k, v)
        logits = jnp.einsum("qc,kc->qk", q, k, precision=precision, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1])).astype(v.dtype)
        return jnp.einsum("qk,kc->qc", weights, v, precision=precision)


class Downsample(nnx.Module):
    """Halves height and width; with `time`, also halves the number of frames, not counting the first of the video."""

    def __init__(self, features: int, *, time: bool, rngs: nnx.Rngs, dtype: DTypeLike):
        self.resample = Conv2d(features, features, stride=2, padding=(0, 1), rngs=rngs, dtype=dtype)
        self.time_conv = nnx.data(
            CausalConv3d(features, features, size=(3, 1, 1), time_stride=2, rngs=rngs, dtype=dtype) if time else None
        )

    def __call__(self, x: Chunk, cache: Cache) -> tuple[Output, Cache]:
        x = self.resample(x)
        if self.time_conv is None:
            return x, None
        if cache is None:
            return x, x[:, -1:]
        return self.time_conv(x, cache)


class Upsample(nnx.Module):
    """Doubles height and width (nearest neighbour) and halves the number of channels.

    With `time`, also doubles the number of frames, not counting the first of the video. The time convolution never sees
    that first frame: when the second arrives, the cache still holds zeros.
    """

    def __init__(self, features: int, *, time: bool, rngs: nnx.Rngs, dtype: DTypeLike):
        self.resample = Conv2d(features, features // 2, rngs=rngs, dtype=dtype)
        self.time_conv = nnx.data(
            CausalConv3d(features, 2 * features, size=(3, 1, 1), rngs=rngs, dtype=dtype) if time else None
        )

    def __call__(self, x: Chunk, cache: Cache) -> tuple[Output, Cache]:
        if self.time_conv is not None and cache is None:
            cache = self.time_conv.empty_cache(x)
        elif self.time_conv is not None:
            x, cache = self.time_conv(x, cache)
            x = rearrange(x, "b t h w (two c) -> b (t two) h w c", two=2)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.resample(x), cache
