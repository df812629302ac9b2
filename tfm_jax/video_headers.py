"""What the header of a video or image says, which is read without decoding the video."""

import math
import struct
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.container import InputContainer

from tfm_jax import images
from tfm_jax.errors import InputError
from tfm_jax.video import CLOCK_TOLERANCE, CONTAINERS, DECODING_TIMES_ONLY, Rate, check_type, is_image, open_video

MAX_SECONDS = 100_000
"""Longer videos do not occur; damaged headers may claim any length."""


class Header(NamedTuple):
    """What a file claims to contain. The pixels may tell otherwise."""

    frames: int
    """An image has one."""
    fps: Fraction | None
    """Frames per second, on average; None for an image."""
    seconds: Fraction
    """How long the video lasts, from its first frame on; 0 for an image."""
    height: int
    """Height and width as displayed: upright, with square pixels."""
    width: int

    def frames_at(self, rate: Rate) -> int:
        """Return the number of frames that can be read at a rate."""
        if rate == "native" or self.fps is None:
            return self.frames
        return max(0, math.ceil((self.seconds - CLOCK_TOLERANCE) * Fraction(rate)))


def read_header(path: Path) -> Header:
    """Read the header of a video or image.

    Raises:
        InputError: the file does not exist or is not a video or image, or its header does not say how long the video
            is.
    """
    check_type(path)
    if is_image(path):
        return Header(1, None, Fraction(0), *images.read_size(path))
    # Otherwise FFmpeg decodes the first frames while it opens the file, which takes a hundred times as long.
    with open_video(path, skip_frame="all") as (container, stream):
        fps = stream.average_rate or stream.base_rate
        demuxer = CONTAINERS[path.suffix.lower()]
        if demuxer == "mov":
            start, turned = Fraction(0), _is_turned(path)
        else:
            start, turned = _first_frame(container, stream)
        if demuxer in DECODING_TIMES_ONLY:
            start = Fraction(0)
        seconds = _end(container, stream) - start
        if not fps or not 0 < seconds <= MAX_SECONDS:
            found = f"the header says {float(seconds):g} s at {float(fps or 0):g} frames a second"
            raise InputError(f"{path}: {found}; expected how long the video lasts")
        context = stream.codec_context
        aspect = stream.sample_aspect_ratio or context.sample_aspect_ratio or 1
        height, width = context.height, max(1, round(context.width * aspect))
        if turned:
            height, width = width, height
        lasting = round(seconds * fps)  # less than the number of frames in the file, if an edit list hides some
        return Header(min(stream.frames or lasting, lasting), fps, seconds, height, width)


def _first_frame(container: InputContainer, stream: av.VideoStream) -> tuple[Fraction, bool]:
    """Return when the first frame is shown, in seconds, and whether it is turned by a quarter.

    PyAV does not tell how Matroska turns pictures unless a frame is decoded.
    """
    frame = next(container.decode(stream), None)
    if frame is None:
        return Fraction(0), False
    start = frame.pts * frame.time_base if frame.pts is not None and frame.time_base is not None else Fraction(0)
    try:
        return start, frame.rotation % 180 != 0
    except ValueError:  # PyAV does not know every type of side data; reading the clip reports it
        return start, False


def _end(container: InputContainer, stream: av.VideoStream) -> Fraction:
    """Return when the video ends, in seconds. If the header does not say so, read all packets, but decode none."""
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    if container.duration is not None:
        return Fraction(container.duration, av.time_base)
    ends = [
        (packet.pts + (packet.duration or 0)) * packet.time_base
        for packet in container.demux(stream)
        if packet.pts is not None and packet.time_base is not None
    ]
    return max(ends, default=Fraction(0))


# --- The boxes of mp4 files ------------------------------------------------------------------------------------------

MOVIE_MATRIX, TRACK_MATRIX = {0: 36, 1: 48}, {0: 40, 1: 52}
"""Version of an mvhd or tkhd box -> place of the display matrix in its content (ISO/IEC 14496-12, 8.2.2 and 8.3.2)."""


def _is_turned(path: Path) -> bool:
    """Return whether the first video of an mp4 or mov file is displayed with its stored axes exchanged."""
    with path.open("rb") as file:
        whole = 0, path.stat().st_size
        turn = np.eye(2)
        for track in _find(file, whole, b"moov", b"trak"):
            if any(_read(file, start + 8, 4) == b"vide" for start, _ in _find(file, track, b"mdia", b"hdlr")):
                for start, _ in _find(file, track, b"tkhd"):
                    turn = _matrix(file, start, TRACK_MATRIX)
                break
        for start, _ in _find(file, whole, b"moov", b"mvhd"):  # the movie as a whole may be turned, too
            turn = turn @ _matrix(file, start, MOVIE_MATRIX)
    across, along = abs(turn[0]).tolist()
    return along > across


def _find(file: BinaryIO, place: tuple[int, int], *kinds: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the content of each box of a kind starts and ends. `kinds` is the path to the boxes, from `place`."""
    kind_wanted, inner = kinds[0], kinds[1:]
    start, end = place
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", _read(file, start, 8))
        content = start + 8
        if size == 1:  # a large box
            [size] = struct.unpack(">Q", _read(file, content, 8))
            content += 8
        after = end if size == 0 else min(end, start + size)
        if after < content:
            return
        if kind == kind_wanted and inner:
            yield from _find(file, (content, after), *inner)
        elif kind == kind_wanted:
            yield content, after
        start = after


def _matrix(file: BinaryIO, start: int, places: Mapping[int, int]) -> np.ndarray:
    """Return the directions in which the stored axes are displayed, up to a factor."""
    place = places.get(int.from_bytes(_read(file, start, 1)))
    if place is None:
        return np.eye(2)
    return np.frombuffer(_read(file, start + place, 36), ">i4").reshape(3, 3)[:2, :2].astype(float)


def _read(file: BinaryIO, start: int, count: int) -> bytes:
    """Read bytes, with zeros in the place of those behind the end of the file."""
    file.seek(start)
    return file.read(count).ljust(count, b"\0")
