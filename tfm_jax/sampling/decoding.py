"""Decode latents to frames in constant memory: latent frame by latent frame, and on request tile by tile."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from tfm_jax.errors import InputError
from tfm_jax.sampling.outputs import SampleRun
from tfm_jax.video import to_uint8
from tfm_jax.wan.vae import WanVae

FrameLatents = Float[np.ndarray, "f h w c"]
BatchLatents = Float[np.ndarray, "b f h w c"]
Pixels = Float[np.ndarray, "b t y x 3"]
Frame = UInt8[np.ndarray, "y x 3"]


def decode(vae: WanVae, latents: BatchLatents, numbers: Sequence[int], run: SampleRun) -> dict[int, Iterator[Frame]]:
    """Map the number of each video to its frames.

    The videos are decoded together, frame by frame, as the frames of one of them are taken. Those of the others are
    kept until they are taken.

    Args:
        latents: may have further rows, which are decoded too but not returned.

    Raises:
        InputError: from the iterator of a video, if its latents or pixels are not finite.
    """
    copies = itertools.tee(_as_bytes(decode_frames(vae, latents, run.sampling.tile)), len(numbers))
    return {
        number: _frames(chunks, row, latents[row], number, run)
        for row, (number, chunks) in enumerate(zip(numbers, copies, strict=True))
    }


class _Chunk(NamedTuple):
    """Some successive frames of a batch of videos."""

    pixels: UInt8[np.ndarray, "b t y x 3"]
    finite: Bool[np.ndarray, "b"]


def _as_bytes(decoded: Iterable[Pixels]) -> Iterator[_Chunk]:
    for pixels in decoded:
        finite = np.asarray(np.isfinite(pixels).all(axis=(1, 2, 3, 4)))
        yield _Chunk(to_uint8(np.nan_to_num(pixels)), finite)


def _frames(chunks: Iterable[_Chunk], row: int, latents: FrameLatents, number: int, run: SampleRun) -> Iterator[Frame]:
    check_latents(latents, number, run)
    for pixels, finite in chunks:
        if not finite[row]:
            produced = "produced pixels that are not finite"
            raise InputError(f"video {number}: the autoencoder of {run.model.path} {produced}")
        yield from pixels[row]


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


def decode_frames(vae: WanVae, latents: BatchLatents, tile: tuple[int, ...] | None = None) -> Iterator[Pixels]:
    """Yield the frames of a batch of videos with values in -1..1, a few at a time.

    Under `jax.set_mesh`, each device decodes its own videos of the batch.

    Args:
        tile: height and width of tiles of latents that overlap by half. They are decoded one after the other, which
            takes about twice the time in a fraction of the memory of the device. All frames are then held in the
            memory of the host until the last tile is done.
    """
    if tile is None or (tile[0] >= latents.shape[2] and tile[1] >= latents.shape[3]):
        yield from _decode(vae, latents)
    else:
        yield _decode_tiles(vae, latents, tile)


def _decode(vae: WanVae, latents: BatchLatents) -> Iterator[Pixels]:
    yield from map(np.asarray, vae.decode_in_chunks(jnp.asarray(latents)))


def _decode_tiles(vae: WanVae, latents: BatchLatents, tile: tuple[int, ...]) -> Pixels:
    """Decode all tiles and blend them, with weights that fall linearly over the overlap, as the TFM release does."""
    videos, frames, *size = latents.shape[:4]
    stride = vae.config.space_stride
    lengths = [min(length, whole) for length, whole in zip(tile, size, strict=True)]
    shape = (videos, 1 + (frames - 1) * vae.config.time_stride, size[0] * stride, size[1] * stride, 3)
    total = np.zeros(shape, np.float32)
    weights = np.zeros((*shape[2:4], 1), np.float32)
    for top in tile_starts(size[0], lengths[0]):
        for left in tile_starts(size[1], lengths[1]):
            part = latents[:, :, top : top + lengths[0], left : left + lengths[1]]
            ramps = [
                _ramp(start, length, whole, stride)
                for start, length, whole in zip((top, left), lengths, size, strict=True)
            ]
            weight = np.minimum(ramps[0][:, None], ramps[1])[..., None]
            place = np.s_[top * stride : (top + lengths[0]) * stride, left * stride : (left + lengths[1]) * stride]
            begin = 0
            for pixels in _decode(vae, part):
                total[:, begin : begin + pixels.shape[1], *place] += pixels * weight
                begin += pixels.shape[1]
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
