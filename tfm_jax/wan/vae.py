"""The video autoencoder of Wan2.1: pixels in -1..1 to normalised latents and back.

Latents have an eighth of the height and width and about a quarter of the frames: 4 (f - 1) + 1 frames become f latent
frames. Both directions process the video in chunks of one latent frame, so that memory use, apart from the input and
output, does not depend on the length of the video.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from tfm_jax.arrays import Latents, Video
from tfm_jax.errors import InputError
from tfm_jax.sharding import per_device
from tfm_jax.wan.layers import Linear
from tfm_jax.wan.vae_layers import (
    AttentionBlock,
    Cache,
    CausalConv3d,
    ChannelNorm,
    Chunk,
    Downsample,
    Output,
    ResidualBlock,
    Upsample,
    run_layers,
)


class Stage(NamedTuple):
    """One layer in the encoder's or decoder's sequence: a residual block or a resampler."""

    features_in: int
    features_out: int
    resample: bool
    """Whether the layer is a resampler."""
    time: bool
    """Whether the resampler also halves or doubles the number of frames."""


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of the autoencoder and statistics of its latents. The defaults are those of Wan2.1."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )

    def __post_init__(self) -> None:
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise InputError(f"{name} has {len(getattr(self, name))} values; expected z_dim = {self.z_dim}")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise InputError(
                f"temporal_downsample has {len(self.temporal_downsample)} values; "
                f"expected {len(self.dim_mult) - 1}, one fewer than dim_mult"
            )

    @property
    def space_stride(self) -> int:
        """Number of pixels per latent position, along height and along width."""
        return 2 ** len(self.temporal_downsample)

    @property
    def time_stride(self) -> int:
        """Number of pixel frames per latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    def encoder_stages(self) -> list[Stage]:
        """Return the layers of the encoder between its first convolution and its middle."""
        stages, width = [], self.base_dim
        for level, mult in enumerate(self.dim_mult):
            for _ in range(self.num_res_blocks):
                stages.append(Stage(width, self.base_dim * mult, resample=False, time=False))
                width = self.base_dim * mult
            if level < len(self.temporal_downsample):
                stages.append(Stage(width, width, resample=True, time=self.temporal_downsample[level]))
        return stages

    def decoder_stages(self) -> list[Stage]:
        """Return the layers of the decoder between its middle and its last norm."""
        stages, width = [], self.base_dim * self.dim_mult[-1]
        for level, mult in enumerate(reversed(self.dim_mult)):
            for _ in range(self.num_res_blocks + 1):
                stages.append(Stage(width, self.base_dim * mult, resample=False, time=False))
                width = self.base_dim * mult
            if level < len(self.temporal_downsample):
                stages.append(Stage(width, width // 2, resample=True, time=self.temporal_downsample[-1 - level]))
                width //= 2
        return stages


def _stage_layers(
    stages: list[Stage], resampler: type[Downsample | Upsample], rngs: nnx.Rngs, dtype: DTypeLike
) -> list[nnx.Module]:
    return [
        resampler(stage.features_in, time=stage.time, rngs=rngs, dtype=dtype)
        if stage.resample
        else ResidualBlock(stage.features_in, stage.features_out, rngs=rngs, dtype=dtype)
        for stage in stages
    ]


def _middle(features: int, rngs: nnx.Rngs, dtype: DTypeLike) -> list[nnx.Module]:
    return [
        ResidualBlock(features, features, rngs=rngs, dtype=dtype),
        AttentionBlock(features, rngs=rngs, dtype=dtype),
        ResidualBlock(features, features, rngs=rngs, dtype=dtype),
    ]


class Encoder(nnx.Module):
    """Maps pixels to `2 z_dim` channels, from which `quant_conv` computes the mean and log-variance."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        stages = config.encoder_stages()
        width = stages[-1].features_out
        self.conv_in = CausalConv3d(3, config.base_dim, rngs=rngs, dtype=dtype)
        self.down = nnx.List(_stage_layers(stages, Downsample, rngs, dtype))
        self.mid = nnx.List(_middle(width, rngs, dtype))
        self.norm_out = ChannelNorm(width, dtype=dtype)
        self.conv_out = CausalConv3d(width, 2 * config.z_dim, rngs=rngs, dtype=dtype)

    def __call__(self, x: Chunk, cache: Cache) -> tuple[Output, Cache]:
        before, last = (None, None) if cache is None else cache
        x, after = run_layers([self.conv_in, *self.down, *self.mid], x, before)
        x, last = self.conv_out(jax.nn.silu(self.norm_out(x)), last)
        return x, (after, last)


class Decoder(nnx.Module):
    """Maps the output of `post_quant_conv` to pixels, which are not yet clipped to -1..1."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        stages = config.decoder_stages()
        width = stages[-1].features_out
        self.conv_in = CausalConv3d(config.z_dim, stages[0].features_in, rngs=rngs, dtype=dtype)
        self.mid = nnx.List(_middle(stages[0].features_in, rngs, dtype))
        self.up = nnx.List(_stage_layers(stages, Upsample, rngs, dtype))
        self.norm_out = ChannelNorm(width, dtype=dtype)
        self.conv_out = CausalConv3d(width, 3, rngs=rngs, dtype=dtype)

    def __call__(self, x: Chunk, cache: Cache) -> tuple[Output, Cache]:
        before, last = (None, None) if cache is None else cache
        x, after = run_layers([self.conv_in, *self.mid, *self.up], x, before)
        x, last = self.conv_out(jax.nn.silu(self.norm_out(x)), last)
        return x, (after, last)


def run_in_chunks(
    step: Callable[[Chunk, Cache], tuple[Output, Cache]],
    x: Chunk,
    *,
    frames_in: int,
    frames_out: int,
    unroll: bool = False,
) -> Output:
    """Run `step` on the first frame of `x`, then on `frames_in` frames at a time, and concatenate the outputs.

    Args:
        step: maps a chunk and a cache (None for the first chunk) to an output and the next cache.
        frames_in: number of frames in each chunk after the first.
        frames_out: number of frames that `step` returns for each chunk after the first.
        unroll: compile `step` once per chunk instead of compiling a loop. Compiling takes longer, but XLA on CPU has no
            fast convolutions inside loops.
    """
    first, cache = step(x[:, :1], None)
    chunks = (x.shape[1] - 1) // frames_in
    if chunks == 0:
        return first
    if unroll:
        outs = [first]
        for index in range(chunks):
            out, cache = step(x[:, 1 + index * frames_in : 1 + (index + 1) * frames_in], cache)
            outs.append(out)
        return jnp.concatenate(outs, axis=1)
    # Write the outputs into a carried buffer: transposing stacked outputs would need a second copy of the whole video.
    joined = jnp.zeros((first.shape[0], 1 + chunks * frames_out, *first.shape[2:]), first.dtype)

    def body(carry: tuple[Output, Cache], index: jax.Array) -> tuple[tuple[Output, Cache], None]:
        joined, cache = carry
        chunk = jax.lax.dynamic_slice_in_dim(x, 1 + index * frames_in, frames_in, axis=1)
        out, cache = step(chunk, cache)
        return (jax.lax.dynamic_update_slice_in_dim(joined, out, 1 + index * frames_out, axis=1), cache), None

    joined = jax.lax.dynamic_update_slice_in_dim(joined, first, 0, axis=1)
    (joined, _), _ = jax.lax.scan(body, (joined, cache), jnp.arange(chunks))
    return joined


class WanVae(nnx.Module):
    """Encoder and decoder, including the normalisation of latents (`wan/modules/vae.py` of Wan2.1).

    Weights and computation are in `dtype`. `encode` and `decode` return the dtype of their input.
    """

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.quant_conv = Linear(2 * config.z_dim, 2 * config.z_dim, rngs=rngs, dtype=dtype)
        self.post_quant_conv = Linear(config.z_dim, config.z_dim, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weights."""
        return self.quant_conv.kernel.dtype

    def _statistics(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.config.latents_mean, dtype), jnp.asarray(self.config.latents_std, dtype)

    @jax.jit
    def encode(self, video: Video) -> Latents:
        """Encode a video with values in -1..1 to the posterior mean, normalised per channel: (mu - mean) / std.

        Raises:
            InputError: the number of frames is not 4n + 1, or the height or width is not a multiple of 8.
        """
        time, space = self.config.time_stride, self.config.space_stride
        if (video.shape[1] - 1) % time:
            raise InputError(f"video has {video.shape[1]} frames; expected {time}n + 1")
        if video.shape[2] % space or video.shape[3] % space:
            raise InputError(f"video is {video.shape[2]}x{video.shape[3]}; expected multiples of {space}")
        mean, std = self._statistics(video.dtype)

        def step(chunk: Chunk, cache: Cache) -> tuple[Output, Cache]:
            features, cache = self.encoder(chunk.astype(self.dtype), cache)
            mu, _ = jnp.split(self.quant_conv(features), 2, axis=-1)
            return (mu.astype(video.dtype) - mean) / std, cache

        return run_in_chunks(step, video, frames_in=time, frames_out=1)

    @jax.jit
    def decode(self, latents: Latents) -> Video:
        """Decode normalised latents to a video with values clipped to -1..1."""
        return run_in_chunks(self.decode_chunk, latents, frames_in=1, frames_out=self.config.time_stride)

    def decode_in_chunks(self, latents: Latents) -> Iterator[Video]:
        """Yield the frames of `decode` as they are decoded: the first frame, then those of one latent frame at a time.

        Memory use does not depend on the length of the video, and neither do the two programs that run. Under
        `jax.set_mesh`, each device decodes its own videos of the batch.
        """
        cache = None
        for frame in range(latents.shape[1]):
            chunk = jax.lax.dynamic_slice_in_dim(latents, frame, 1, axis=1)
            pixels, cache = self.decode_chunk(chunk, cache)
            yield pixels

    @partial(jax.jit, donate_argnames="cache")
    def decode_chunk(self, chunk: Chunk, cache: Cache) -> tuple[Output, Cache]:
        def decode(chunk: Chunk, cache: Cache, vae: WanVae) -> tuple[Output, Cache]:
            mean, std = vae._statistics(chunk.dtype)
            mapped = vae.post_quant_conv((chunk * std + mean).astype(vae.dtype))
            pixels, cache = vae.decoder(mapped, cache)
            return jnp.clip(pixels, -1, 1).astype(chunk.dtype), cache

        # The compiler would move the videos of a batch between devices for the attention, which loops over frames.
        return per_device(decode, (chunk, cache, self), (("batch",), ("batch",), ()))
