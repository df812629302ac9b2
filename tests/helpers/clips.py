"""Clips for tests of video files, and files with properties that `write_clip` never gives them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

FPS = 16
SIZES = [(17, 64, 64), (17, 62, 90), (9, 34, 50), (2, 480, 832)]
"""(frames, height, width): multiples of 16, multiples of only 2, and a picture that x264 splits over threads."""


def smooth_clip(frames: int = 17, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Return a clip of drifting coloured blobs, which is easy for a video codec and different in every region."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    canvas = np.asarray(Image.fromarray(pixels).resize((width + frames, height + frames), Image.Resampling.BICUBIC))
    return np.stack([canvas[i : i + height, i : i + width] for i in range(frames)])


def grey_clip(frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Return a clip in which frame i has the value 10 + 5 i everywhere, so that `which` can recognise the frame."""
    values = np.arange(10, 10 + 5 * frames, 5, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (frames, height, width, 3))


def which(clip: np.ndarray) -> list[int]:
    """Return the numbers of the frames of a grey clip."""
    return [round((float(frame.mean()) - 10) / 5) for frame in clip]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def encode(
    path: Path,
    clip: np.ndarray,
    *,
    stamps: list[float] | None = None,
    rotation: int = 0,
    matrix: list[int] | None = None,
    codec: str = "libx264",
    container: str = "mp4",
    pix_fmt: str = "yuv420p",
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    b_frames: int = 0,
) -> Path:
    """Write a file with properties that `write_clip` never gives a file; `stamps` are in seconds."""
    with av.open(path, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        if codec != "libx264":  # the default of the old codecs blurs everything
            stream.bit_rate = 8_000_000
        if b_frames:
            stream.codec_context.max_b_frames = b_frames
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix:
            stream.set_display_matrix(matrix)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if stamps:
                frame.pts, frame.time_base = round(1000 * stamps[number]), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def display_matrix(a: float, b: float, c: float, d: float, u: float = 0) -> list[int]:
    """Return a display matrix as stored in a container: 16.16 fixed point, with 2.30 in the last column."""
    return [round(n) for n in (a * 2**16, b * 2**16, u * 2**30, c * 2**16, d * 2**16, 0, 0, 0, 2**30)]


def write_sound(path: Path) -> None:
    """Write an mp4 file with sound but no video."""
    with av.open(path, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
