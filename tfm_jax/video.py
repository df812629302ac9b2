"""Clips: read the pixels of a video or image, write a video, and show several clips in one picture.

We open every file ourselves and give the decoder a stream and the container format. A name such as `concat:...` or a
playlist with the suffix `.mp4` therefore cannot make the decoder open another file.
"""

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import Interpolation
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from tfm_jax import images
from tfm_jax.errors import InputError
from tfm_jax.files import replacing

Rate = float | int | Literal["native"]
"""Frames per second; native means the frames of a video as they are."""

Resize = images.Resize

CONTAINERS = {
    ".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska",
    ".avi": "avi", ".wmv": "asf", ".flv": "flv",
}  # fmt: skip
"""File suffix -> name of the demuxer."""

DECODING_TIMES_ONLY = {"avi", "asf"}
"""Demuxers of containers that do not store when a frame is shown, only when it is decoded."""

MAX_FRAME_PIXELS = 8192 * 4320
"""Frames are decoded one by one, so this bounds the memory that a tiny file can request."""

CLOCK_TOLERANCE = Fraction(1, 1000)
"""How late the timestamp of a frame may be, in seconds. Containers round timestamps, Matroska to milliseconds."""

TO_RGB = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
"""Interpolates colour to full resolution; the default repeats every second column, which costs 4 dB."""

TO_YUV = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
"""Without accurate rounding, the result depends on the instruction set of the CPU."""

BT709 = 1
LIMITED_RANGE = 1

ENCODER_OPTIONS = {"crf": "12", "x264-params": "cpu-independent=1"}
"""x264's AVX-512 code for the macroblock tree processes eight blocks at a time. If the width of the picture is not a
multiple of 128, it reads uninitialised memory behind the last row (x264 revision c24e06c2, common/x86/mc-a2.asm,
mbtree_propagate_list_internal). With cpu-independent, x264 uses its C code for this part."""


def read_clip(path: Path, frames: int, height: int, width: int, fps: float | int) -> UInt8[np.ndarray, "t y x 3"]:
    """Read the frames shown at 0, 1 / fps, 2 / fps, ... seconds, upright, scaled and cropped to the given size.

    The crop keeps the centre. Scaling keeps the aspect ratio of the displayed picture; pixels need not be square.

    An image is a clip of one frame.

    Raises:
        InputError: the file does not exist, is not a video or image, is damaged, is too short for `frames`, or has
            frames of more than `MAX_FRAME_PIXELS` pixels.
    """
    [clip] = read_windows(path, [0], frames, height, width, fps)
    return clip


def read_windows(
    path: Path, starts: Sequence[int], frames: int, height: int, width: int, fps: Rate, resize: Resize = "bicubic"
) -> Iterator[UInt8[np.ndarray, "t y x 3"]]:
    """Read clips that begin at the given frames of a video, which is decoded once.

    The frames of a video are those shown at 0, 1 / fps, 2 / fps, ... seconds or, if `fps` is native, all of them. They
    are counted from 0.

    Args:
        starts: in ascending order; the clips do not overlap.
        frames: number of frames of each clip.

    Raises:
        InputError: see `read_clip`. The clips before a damaged place have been yielded.
    """
    check_type(path)
    if is_image(path):
        yield _read_image(path, starts[-1] + frames, height, width, resize)
        return
    numbers = [start + number for start in starts for number in range(frames)]
    with open_video(path) as (container, stream):
        decoded = _decode(container, stream, path)
        if fps == "native":
            shown = _frames_numbered(numbers, decoded, path)
        else:
            shown = _frames_at([number / Fraction(fps) for number in numbers], decoded, path)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        fitted = (_fit(frame, height, width, aspect, resize, path) for frame in shown)
        for _ in starts:
            yield np.stack(list(itertools.islice(fitted, frames)))


def read_frames(path: Path) -> Iterator[UInt8[np.ndarray, "y x 3"]]:
    """Yield all frames of a video one by one, upright, with the pixels that the file stores.

    Raises:
        InputError: the file does not exist or is not a video, is damaged, or has frames of more than `MAX_FRAME_PIXELS`
            pixels. The frames before a damaged place have been yielded.
    """
    check_type(path)
    with open_video(path) as (container, stream):
        for _, frame in _intact(_decode(container, stream, path), path):
            yield _turned(_rgb(frame), _orientation(frame, path))


def check_type(path: Path) -> None:
    """Raise InputError if there is no such file, or if it is not a video or image by its name."""
    if not os.path.isfile(path):  # unlike Path.is_file, this says no to a name that is too long
        raise InputError(f"{path}: no such file; expected a video or image")
    if path.suffix.lower() not in (*CONTAINERS, *images.SUFFIXES):
        raise InputError(f"{path}: unknown file type; expected one of {', '.join((*CONTAINERS, *images.SUFFIXES))}")


def is_image(path: Path) -> bool:
    return path.suffix.lower() in images.SUFFIXES


@contextlib.contextmanager
def open_video(path: Path, **options: str) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Open a video, and yield the container and its first video stream.

    Raises:
        InputError: the file is not a video, or is damaged. FFmpeg's errors in the block have the same effect.
    """
    try:
        with path.open("rb") as file, _open(file, CONTAINERS[path.suffix.lower()], options) as container:
            yield container, _video_stream(container, path)
    except (FFmpegError, OSError) as error:
        raise InputError(f"{path}: is damaged or not a video ({error.strerror}); expected an intact video") from error


def write_clip(
    path: Path, clip: Iterable[np.ndarray], fps: float | int, about: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Encode frames as an mp4 file (H.264, 4:2:0, BT.709). An existing file is replaced at the end.

    The bytes depend only on the arguments and the build of PyAV, not on the load or the number of cores.

    Args:
        clip: the frames, `[y, x, 3]` uint8 each. They are encoded one by one as they come.
        about: metadata of the file, such as title and comment.

    Raises:
        InputError: height or width is odd, which 4:2:0 does not support.
    """
    frames = iter(clip)
    first = next(frames)
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise InputError(f"{path}: the clip has {height} x {width} pixels; expected an even height and width")
    options = {"movflags": "+faststart"}
    # An absolute path, because FFmpeg takes the start of a relative one such as concat:a.mp4 for a protocol.
    with replacing(path.absolute()) as scratch, av.open(scratch, "w", format="mp4", options=options) as container:
        container.metadata.update(about)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {**ENCODER_OPTIONS}
        context = stream.codec_context
        context.thread_count = 1  # the bytes depend on the number of threads, which is the number of cores by default
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        for pixels in itertools.chain([first], frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            yuv = frame.reformat(format="yuv420p", dst_colorspace=BT709, interpolation=TO_YUV, threads=1)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))


def find_clips(folder: Path, suffixes: Container[str] = (".mp4",)) -> list[Path]:
    """Return the videos of a folder, sorted by the numbers in their names: 999.mp4 comes before 1000.mp4."""

    def key(file: Path) -> tuple[list[str | int], str]:
        parts = re.split(r"([0-9]+)", file.name)  # every second part is a number
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name

    return sorted((file for file in folder.glob("*") if file.suffix.lower() in suffixes), key=key)


def from_uint8(pixels: UInt8[np.ndarray | Array, "*any 3"]) -> Float[np.ndarray | Array, "*any 3"]:
    """Map 0..255 to -1..1, the range of the video autoencoder."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_uint8(pixels: Float[np.ndarray, "*any 3"]) -> UInt8[np.ndarray, "*any 3"]:
    """Map -1..1 to 0..255, with clipping and rounding."""
    return np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)


def contact_sheet(clips: Iterable[np.ndarray], labels: Sequence[str], columns: int = 9, cell: int = 128) -> Image.Image:
    """Draw one row per clip (`[t, y, x, 3]` uint8): its label and up to `columns` evenly spaced frames."""
    font, margin, line = ImageFont.load_default(14), 8, 20
    rows = [_thumbnails(clip, columns, cell) for clip in clips]
    heights = [line + row[0].height + margin for row in rows]
    sheet = Image.new("RGB", (margin + columns * (cell + margin), margin + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = margin
    for row, label, step in zip(rows, labels, heights, strict=True):
        draw.text((margin, top), _cut(label, sheet.width - 2 * margin, font), fill="black", font=font)
        for column, image in enumerate(row):
            sheet.paste(image, (margin + column * (cell + margin), top + line))
        top += step
    return sheet


def _thumbnails(clip: np.ndarray, columns: int, cell: int) -> list[Image.Image]:
    picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
    size = (cell, max(1, round(cell * clip.shape[1] / clip.shape[2])))
    return [Image.fromarray(clip[i]).resize(size, Image.Resampling.BICUBIC) for i in picks]


def _cut(label: str, width: int, font: Any) -> str:
    """Shorten a label to one line of at most `width` pixels."""
    text = " ".join(label[:width].split())
    if len(label) <= width and font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


class _Seekable:
    """An open file for PyAV, which prints a traceback if `seek` raises: a damaged file may lead before its start."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.read, self.tell = file.read, file.tell

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):
            return -errno.EINVAL


def _open(file: BinaryIO, demuxer: str, options: dict[str, str]) -> InputContainer:
    # Opening decodes a frame if the header is incomplete, so the limit is needed here too.
    limit = {"max_pixels": str(MAX_FRAME_PIXELS)}
    return av.open(_Seekable(file), "r", format=demuxer, metadata_errors="ignore", options=limit | options)


def _video_stream(container: InputContainer, path: Path) -> av.VideoStream:
    """Return the first video stream. Its decoder is set to report damage and to enforce the size limit."""
    if not container.streams.video:
        raise InputError(f"{path}: contains no video stream; expected a video")
    stream = container.streams.video[0]
    context: av.VideoCodecContext | None = stream.codec_context
    if context is None:  # FFmpeg cannot decode the codec; PyAV's types omit this case
        raise InputError(f"{path}: there is no decoder for the video stream; expected a codec such as H.264")
    if context.width * context.height > MAX_FRAME_PIXELS:
        size = f"{context.width} x {context.height}"
        raise InputError(f"{path}: has frames of {size} pixels; expected at most {MAX_FRAME_PIXELS:,} pixels per frame")
    context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # a frame may be larger than the header claims
    stream.thread_type = "NONE"  # with threads, the decoder conceals damage and does not mark the frame
    return stream


def _read_image(path: Path, frames: int, height: int, width: int, resize: Resize) -> UInt8[np.ndarray, "t y x 3"]:
    if frames != 1:
        raise InputError(f"{path}: is an image, which has one frame; expected {frames}")
    return images.scale_and_crop(images.read_image(path, MAX_FRAME_PIXELS), height, width, Fraction(1), resize)[None]


def _decode(container: InputContainer, stream: av.VideoStream, path: Path) -> Iterator[av.VideoFrame]:
    decoded = container.decode(stream)
    return _with_times(decoded) if CONTAINERS[path.suffix.lower()] in DECODING_TIMES_ONLY else decoded


def _with_times(decoded: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Set when each frame is shown, for containers that store only when frames are decoded.

    Decoders return frames in the order in which they are shown, each with the time of the data that was decoded last.
    This is late by the same delay for every frame. The last frames come without new data and have no such time.
    """
    last = gap = 0
    for frame in decoded:
        frame.pts = last + (frame.duration or gap) if frame.dts is None else frame.dts
        last, gap = frame.pts, frame.pts - last
        yield frame


def _intact(decoded: Iterator[av.VideoFrame], path: Path) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Yield every frame with its time, in seconds after the first frame. Refuse damaged frames and a wrong order."""
    first = last = None
    for number, frame in enumerate(decoded):
        if frame.is_corrupt or frame.pts is None or frame.time_base is None:
            raise InputError(f"{path}: frame {number} is damaged; expected an intact video")
        stamp = frame.pts * frame.time_base
        if first is None or last is None:
            first = last = stamp
        if stamp < last:
            raise InputError(f"{path}: frame {number} is shown before frame {number - 1}; expected frames in order")
        last = stamp
        yield stamp - first, frame


def _frames_numbered(numbers: Sequence[int], decoded: Iterator[av.VideoFrame], path: Path) -> Iterator[av.VideoFrame]:
    """Yield the frames with these numbers, which ascend. Stop decoding after the last one."""
    pending, count = list(reversed(numbers)), 0
    for count, (_, frame) in enumerate(_intact(decoded, path), 1):
        if pending[-1] == count - 1:
            yield frame
            pending.pop()
        if not pending:
            return
    raise InputError(f"{path}: has {count} frames; expected at least {numbers[-1] + 1}")


def _frames_at(times: Sequence[Fraction], decoded: Iterator[av.VideoFrame], path: Path) -> Iterator[av.VideoFrame]:
    """Yield the frame shown at each time, in seconds after the first frame. Stop decoding after the last time."""
    pending = list(reversed(times))
    shown, count = None, 0
    moment = gap = lasts = Fraction(0)
    for time, frame in _intact(decoded, path):
        while shown is not None and pending and pending[-1] + CLOCK_TOLERANCE < time:
            yield shown
            pending.pop()
        if not pending:
            return
        gap, moment, lasts = time - moment, time, frame.duration * (frame.time_base or 0)
        shown, count = frame, count + 1
    if shown is None:
        raise InputError(f"{path}: no frame could be decoded; expected a video")
    end = moment + (lasts or gap)
    while pending and (pending[-1] + CLOCK_TOLERANCE < end or pending[-1] <= moment):  # the duration may be unknown
        yield shown
        pending.pop()
    if pending:
        wanted = f"{len(times)} frames, the last one at {float(times[-1]):.2f} s"
        raise InputError(f"{path}: has {count} frames and lasts {float(end):.2f} s; expected enough for {wanted}")


def _fit(
    frame: av.VideoFrame, height: int, width: int, aspect: Fraction, resize: Resize, path: Path
) -> UInt8[np.ndarray, "y x 3"]:
    """Return the upright pixels of a frame, cropped around its centre to the new aspect ratio and scaled smoothly."""
    turn = _orientation(frame, path)
    if _swaps_axes(turn):
        height, width = width, height
    pixels = images.scale_and_crop(Image.fromarray(_rgb(frame)), height, width, aspect, resize)
    return _turned(pixels, turn)


def _rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "y x 3"]:
    return frame.to_ndarray(format="rgb24", interpolation=TO_RGB)


def _turned(pixels: UInt8[np.ndarray, "y x 3"], turn: Int[np.ndarray, "2 2"]) -> UInt8[np.ndarray, "y2 x2 3"]:
    """Return the pixels as displayed; `turn` is what `_orientation` returns."""
    step_x, step_y = turn.sum(0)
    return (pixels.swapaxes(0, 1) if _swaps_axes(turn) else pixels)[::step_y, ::step_x]


def _swaps_axes(turn: Int[np.ndarray, "2 2"]) -> bool:
    return bool(turn[0, 0] == 0)


def _orientation(frame: av.VideoFrame, path: Path) -> Int[np.ndarray, "2 2"]:
    """Return the directions in which the stored axes are displayed.

    Row 0 is the (x, y) direction in which the stored x axis is displayed, and row 1 that of the stored y axis.

    The display matrix `[[a, b, u], [c, d, v], [x, y, w]]` maps the stored point (p, q, 1) to (a p + c q + x,
    b p + d q + y), up to perspective (FFmpeg, libavutil/display.h). The eight combinations of quarter turns and flips
    are supported. Scale and translation do not matter, because the picture is scaled and cropped afterwards.
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError as error:  # PyAV does not know every type of side data that FFmpeg has
        raise InputError(f"{path}: has side data that cannot be read ({error}); expected an ordinary video") from None
    if data is None:
        return np.eye(2, dtype=int)
    matrix = np.frombuffer(data, np.int32).reshape(3, 3).astype(float)
    axes = matrix[:2, :2] / np.linalg.norm(matrix[:2, :2], axis=1, keepdims=True).clip(1)
    turn = axes.round().astype(int)
    right_angles = (abs(turn).sum(0) == 1).all() and (abs(turn).sum(1) == 1).all() and abs(axes - turn).max() < 0.01
    if not right_angles or matrix[:2, 2].any():
        values = ", ".join(f"{value:g}" for value in (matrix / [2**16, 2**16, 2**30]).ravel())
        raise InputError(f"{path}: has display matrix [{values}]; expected flips and turns by multiples of 90 degrees")
    return turn
