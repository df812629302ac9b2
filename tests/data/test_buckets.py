"""Sizes of training clips, compared with a search over all possibilities."""

import math

import numpy as np
import pytest

from tfm_jax.config import ClipConfig
from tfm_jax.data.buckets import RATIOS, Bucket, derive_sizes, list_buckets, nearest


def test_the_sizes_of_a_configuration():
    assert list_buckets(ClipConfig(frames=17, height=64, width=48)) == [(17, 64, 48)]
    several = ClipConfig(frames=17, height=64, width=48, buckets=((81, 480, 832), (17, 64, 96)))
    assert list_buckets(several) == [(81, 480, 832), (17, 64, 96)]
    derived = list_buckets(ClipConfig(frames=17, height=64, width=48, max_pixels=480 * 832))
    assert {Bucket(17, 480, 832), Bucket(17, 832, 480), Bucket(17, 624, 624)} <= set(derived)


@pytest.mark.parametrize("pixels", [1024, 5000, 64 * 96, 256 * 256, 480 * 832, 720 * 1280, 1080 * 1920])
def test_derived_sizes(pixels):
    sizes = derive_sizes(pixels)
    assert len(sizes) == len(set(sizes))
    assert all(height % 16 == width % 16 == 0 and 0 < height * width <= pixels for height, width in sizes)
    assert sorted((width, height) for height, width in sizes) == sorted(sizes)
    grid = [(height, width) for height in range(16, 2500, 16) for width in range(16, 3600, 16)]
    for ratio in map(float, RATIOS):
        ideal = math.sqrt(pixels / ratio), math.sqrt(pixels * ratio)
        around = [(h, w) for h, w in grid if abs(h - ideal[0]) < 16 and abs(w - ideal[1]) < 16 and h * w <= pixels]
        assert max(h * w for h, w in around) in [h * w for h, w in set(around) & set(sizes)]


def test_the_nearest_buckets_by_search():
    rng = np.random.default_rng(0)
    for _ in range(300):
        buckets = [Bucket(*map(int, (4 * n + 1, 16 * h, 16 * w))) for n, h, w in rng.integers(1, 6, (12, 3))]
        height, width = map(int, rng.integers(1, 3000, 2))
        distances = [abs(math.log(b.width / b.height) - math.log(width / height)) for b in buckets]
        best = [b for b, distance in zip(buckets, distances, strict=True) if distance < min(distances) + 1e-9]
        found = nearest(buckets, height, width)
        assert sorted(found) == sorted(best)
        assert [b.frames for b in found] == sorted((b.frames for b in best), reverse=True)


def test_a_square_between_wide_and_tall_is_decided_by_frames():
    buckets = [Bucket(17, 480, 832), Bucket(49, 832, 480)]
    assert nearest(buckets, 500, 500) == [buckets[1], buckets[0]]
