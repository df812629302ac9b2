"""Sizes of training clips, and which of them suits a video."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from tfm_jax.config import ClipConfig, latent_size

RATIOS = (Fraction(4, 3), Fraction(3, 2), Fraction(16, 9), Fraction(2))
"""Width / height of wide pictures; the same ratios are used for tall pictures."""

STEP = 16
"""Height and width of a clip are multiples of this."""


class Bucket(NamedTuple):
    """A size of training clips. Only clips of the same size can be in one batch."""

    frames: int
    height: int
    width: int

    @property
    def latent_size(self) -> tuple[int, int, int]:
        return latent_size(self.frames, self.height, self.width)

    def __str__(self) -> str:
        return f"{self.frames} x {self.height} x {self.width}"


def list_buckets(clip: ClipConfig) -> list[Bucket]:
    """Return the sizes that a configuration allows, before clips are cut."""
    if clip.buckets:
        return [Bucket(*sizes) for sizes in clip.buckets]
    if clip.max_pixels is not None:
        return [Bucket(clip.frames, *size) for size in derive_sizes(clip.max_pixels)]
    return [Bucket(clip.frames, clip.height, clip.width)]


def derive_sizes(max_pixels: int) -> list[tuple[int, int]]:
    """Return heights and widths of at most `max_pixels` pixels, for a square and for `RATIOS`, wide and tall.

    Height and width are near those of the exact ratio, rounded up or down so that the area is as large as possible.
    """
    side = math.isqrt(max_pixels) // STEP * STEP
    wide = [_largest(max_pixels, ratio) for ratio in RATIOS]
    sizes = [*reversed([(width, height) for height, width in wide]), (side, side), *wide]
    return list(dict.fromkeys(sizes))  # small pictures cannot have all ratios


def _largest(max_pixels: int, ratio: Fraction) -> tuple[int, int]:
    height, width = math.sqrt(max_pixels / ratio) / STEP, math.sqrt(max_pixels * ratio) / STEP
    around = [(h * STEP, w * STEP) for h in _neighbours(height) for w in _neighbours(width)]
    fitting = [(h, w) for h, w in around if 0 < h * w <= max_pixels]
    return max(fitting, key=lambda size: (size[0] * size[1], -_distance(Fraction(size[1], size[0]), ratio)))


def _neighbours(value: float) -> tuple[int, int]:
    return math.floor(value), math.ceil(value)


def nearest(buckets: Sequence[Bucket], height: int, width: int) -> list[Bucket]:
    """Return the buckets with the nearest aspect ratio, those with more frames and, then, more pixels first."""
    distances = [_distance(Fraction(bucket.width, bucket.height), Fraction(width, height)) for bucket in buckets]
    chosen = [bucket for bucket, distance in zip(buckets, distances, strict=True) if distance == min(distances)]
    return sorted(chosen, key=lambda bucket: (-bucket.frames, -bucket.height * bucket.width))


def _distance(a: Fraction, b: Fraction) -> Fraction:
    """Return a number that grows with the difference of the logarithms of two ratios, and is exact."""
    return max(a / b, b / a)
