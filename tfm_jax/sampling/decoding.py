"""Decode latents to frames in constant memory: latent frame by latent frame, and on request tile by tile."""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from tfm_jax.errors import InputError
from tfm_jax.sampling.outputs import SampleRun
from tfm_jax.video import to_uint8
from tfm_jax.wan.vae import WanVae

FrameLatents = Float[np.ndarray, "f h w c"]
Frames = Float[np.ndarray, "t y x 3"]


def decode(vae: WanVae, latents: FrameLatents, number: int, run: SampleRun) -> Iterator[UInt8[np.ndarray, "y x 3"]]:
    """Yield the frames of a video as they are decoded.

    Raises:
        InputError: latents or pixels are not finite.
    """
    check_latents(latents, number, run)
    for pixels in decode_frames(vae, latents, run.sampling.tile):
        if not np.isfinite(pixels).all():
            finite = "produced pixels that are not finite"
            raise InputError(f"video {number}: the autoencoder of {run.model.path} {finite}")
        yield from to_uint8(pixels)


def check_latents(latents: FrameLatents, number: int, run: SampleRun) -> None:
    """Raise InputError if the latents of a video are not finite."""
    if not np.isfinite(latents).all():
        guidance = f"sampling.guidance={run.sampling.guidance:g} may be too high"
        values = "the weights or the LoRA may contain extreme values"
        raise InputError(f"video {number}: the latents are not finite; {guidance}, or {values}")


def check_size(vae: WanVae, run: SampleRun) -> None:
    """Raise InputError if the autoencoder makes videos of another size than the configuration's."""
    frames, height, width = run.clip.latent_size
    time, space = vae.config.time_stride, vae.config.space_stride
    size = [1 + (frames - 1) * time, height * space, width * space]
    expected = [run.clip.frames, run.clip.height, run.clip.width]
    if size != expected:
        made = f"the autoencoder makes videos of {' x '.join(map(str, size))}"
        raise InputError(f"{run.model.path}: {made}; expected {' x '.join(map(str, expected))}")


def decode_frames(vae: WanVae, latents: FrameLatents, tile: tuple[int, ...] | None = None) -> Iterator[Frames]:
    """Yield the frames of a video with values in -1..1, a few at a time.

    Args:
        tile: height and width of tiles of latents that overlap by half. They are decoded one after the other, which
            takes about twice the time in a fraction of the memory of the device. All frames are then held in the
            memory of the host until the last tile is done.
    """
    if tile is None or (tile[0] >= latents.shape[1] and tile[1] >= latents.shape[2]):
        yield from _decode(vae, latents)
    else:
        yield _decode_tiles(vae, latents, tile)


def _decode(vae: WanVae, latents: FrameLatents) -> Iterator[Frames]:
    for pixels in vae.decode_in_chunks(jnp.asarray(latents[None])):
        yield np.asarray(pixels)[0]


def _decode_tiles(vae: WanVae, latents: FrameLatents, tile: tuple[int, ...]) -> Frames:
    """Decode all tiles and blend them, with weights that fall linearly over the overlap, as the TFM release does."""
    frames, *size = latents.shape[:3]
    stride = vae.config.space_stride
    lengths = [min(length, whole) for length, whole in zip(tile, size, strict=True)]
    total = np.zeros((1 + (frames - 1) * vae.config.time_stride, size[0] * stride, size[1] * stride, 3), np.float32)
    weights = np.zeros((*total.shape[1:3], 1), np.float32)
    for top in tile_starts(size[0], lengths[0]):
        for left in tile_starts(size[1], lengths[1]):
            part = latents[:, top : top + lengths[0], left : left + lengths[1]]
            ramps = [
                _ramp(start, length, whole, stride)
                for start, length, whole in zip((top, left), lengths, size, strict=True)
            ]
            weight = np.minimum(ramps[0][:, None], ramps[1])[..., None]
            place = np.s_[top * stride : (top + lengths[0]) * stride, left * stride : (left + lengths[1]) * stride]
            begin = 0
            for pixels in _decode(vae, part):
                total[begin : begin + len(pixels), *place] += pixels * weight
                begin += len(pixels)
            weights[place] += weight
    return total / weights


def tile_starts(whole: int, length: int) -> list[int]:
    """Return the starts of tiles that overlap by half and cover `whole`; the last one ends there."""
    step = max(1, length // 2)
    return [min(n * step, whole - length) for n in range(math.ceil((whole - length) / step) + 1)]


def _ramp(start: int, length: int, whole: int, stride: int) -> np.ndarray:
    """Return the weights along one side of a tile, in pixels: they rise from the sides that other tiles overlap."""
    weights = np.ones(length * stride, np.float32)
    rise = np.arange(1, (length - length // 2) * stride + 1, dtype=np.float32)
    rise /= len(rise)
    if start > 0:
        weights[: len(rise)] = rise
    if start + length < whole:
        weights[-len(rise) :] = np.minimum(weights[-len(rise) :], rise[::-1])
    return weights
