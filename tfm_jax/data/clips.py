"""Which part of a video becomes a training clip, and at which size. The decision needs only the header of the file."""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from tfm_jax.config import ClipConfig
from tfm_jax.data.buckets import Bucket, list_buckets, nearest
from tfm_jax.video_headers import Header


class Windows(NamedTuple):
    """The training clips that a video gives. They have the same size."""

    bucket: Bucket
    starts: Sequence[int]
    """Number of the first frame of each clip, ascending. Frames are counted at the rate of the clips."""
    rate: Fraction | None
    """Frames per second of the clips; None for an image."""

    @property
    def seconds(self) -> Fraction:
        """How much of the video is used."""
        return len(self.starts) * self.bucket.frames / self.rate if self.rate else Fraction(0)

    def names(self, video: str) -> list[str]:
        """Name the clips: `a.mp4` begins at the start of the video, and `a.mp4#t=5.062` after 5.062 seconds."""
        return [f"{video}#t={float(start / self.rate):.3f}" if start and self.rate else video for start in self.starts]


class Rejected(NamedTuple):
    """A video that gives no training clip."""

    reason: str
    too_short: bool = False


def choose_windows(header: Header, clip: ClipConfig, name: str, seed: int) -> Windows | Rejected:
    """Choose the training clips that a video gives.

    Args:
        name: the video as the list of clips names it. With `clip.part` random, the part depends on this name and the
            seed only: not on the order of the videos.
    """
    available = header.frames_at(clip.fps)
    buckets = nearest(list_buckets(clip), header.height, header.width)
    bucket = next((bucket for bucket in buckets if bucket.frames <= available), None)
    if bucket is None:
        shortest = buckets[-1]
        if clip.short != "cut" or available < 1:
            return Rejected(_too_short(header, clip, shortest.frames), too_short=True)
        bucket = shortest._replace(frames=(available - 1) // 4 * 4 + 1)
    rate = None if header.fps is None else header.fps if clip.fps == "native" else Fraction(clip.fps)
    return Windows(bucket, _starts(clip.part, available, bucket.frames, f"{seed}/{name}"), rate)


def _starts(part: str, available: int, frames: int, key: str) -> Sequence[int]:
    spare = available - frames
    if part == "windows":
        return range(0, spare + 1, frames)
    if part == "centre":
        return (spare // 2,)
    if part == "random":
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return (int.from_bytes(digest, "big") % (spare + 1),)
    return (0,)


def _too_short(header: Header, clip: ClipConfig, frames: int) -> str:
    if header.fps is None:
        return f"is an image, which has one frame; expected {frames}"
    has = f"has {header.frames} frames and lasts {float(header.seconds):.2f} s"
    return f"{has}; expected enough for {frames} frames at {describe_rate(clip)}"


def describe_rate(clip: ClipConfig) -> str:
    return "the rate of the video" if clip.fps == "native" else f"{clip.fps:g} frames a second"
