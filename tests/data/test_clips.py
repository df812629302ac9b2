"""Which part of a video becomes a training clip: the choice, and the frames that are read."""

from fractions import Fraction

import numpy as np
import pytest
from helpers.clips import encode, grey_clip, which

from tfm_jax.config import ClipConfig
from tfm_jax.data.buckets import Bucket
from tfm_jax.data.clips import Rejected, Windows, choose_windows
from tfm_jax.video import read_windows
from tfm_jax.video_headers import Header, read_header

LONG = Header(frames=300, fps=Fraction(30), seconds=Fraction(10), height=720, width=1280)
"""Ten seconds, which are 160 frames at 16 frames a second."""
IMAGE = Header(frames=1, fps=None, seconds=Fraction(0), height=720, width=1280)


def clip(**fields) -> ClipConfig:
    return ClipConfig(**({"frames": 17, "height": 64, "width": 64} | fields))


def starts(header: Header = LONG, name: str = "a.mp4", seed: int = 0, **fields) -> list[int]:
    chosen = choose_windows(header, clip(**fields), name, seed)
    assert isinstance(chosen, Windows), chosen
    return list(chosen.starts)


def test_parts():
    assert starts() == [0]
    assert starts(part="centre") == [(160 - 17) // 2]
    assert starts(part="windows") == [0, 17, 34, 51, 68, 85, 102, 119, 136]
    assert starts(part="centre", fps="native") == [(300 - 17) // 2]
    assert starts(part="windows", fps="native") == list(range(0, 300 - 16, 17))


def test_random_parts_depend_on_the_name_and_the_seed_only():
    names = [f"{n}.mp4" for n in range(400)]
    first = [starts(part="random", name=name) for name in names]
    assert [starts(part="random", name=name) for name in reversed(names)] == first[::-1]
    assert [starts(part="random", name=name, seed=1) for name in names] != first
    places = np.array(first).ravel()
    assert places.min() < 5
    assert places.max() > 138
    assert places.max() <= 160 - 17
    assert abs(places.mean() - (160 - 17) / 2) < 10
    assert starts(part="random", name="\udcff.mp4")  # a name of a file that is not UTF-8


def test_seconds_and_names():
    chosen = choose_windows(LONG, clip(part="windows", frames=81), "a b.mp4", 0)
    assert chosen == Windows(Bucket(81, 64, 64), range(0, 80, 81), Fraction(16))
    chosen = choose_windows(LONG, clip(part="windows", fps="native", frames=81), "a b.mp4", 0)
    assert chosen.names("a b.mp4") == ["a b.mp4", "a b.mp4#t=2.700", "a b.mp4#t=5.400"]
    assert chosen.seconds == Fraction(3 * 81, 30)
    assert choose_windows(IMAGE, clip(frames=1), "a.png", 0) == Windows(Bucket(1, 64, 64), (0,), None)


def test_short_videos():
    short = LONG._replace(frames=24, seconds=Fraction(24, 30))  # 13 frames at 16 frames a second
    rejected = choose_windows(short, clip(), "a.mp4", 0)
    reason = "has 24 frames and lasts 0.80 s; expected enough for 17 frames at 16 frames a second"
    assert rejected == Rejected(reason, too_short=True)
    assert choose_windows(short, clip(short="refuse"), "a.mp4", 0) == rejected
    assert choose_windows(short, clip(short="cut"), "a.mp4", 0).bucket == (13, 64, 64)
    assert choose_windows(short, clip(short="cut", fps="native"), "a.mp4", 0).bucket == (17, 64, 64)
    assert choose_windows(short, clip(short="cut", frames=81, fps="native"), "a.mp4", 0).bucket == (21, 64, 64)
    assert choose_windows(IMAGE, clip(short="cut"), "a.png", 0).bucket == (1, 64, 64)
    reason = "is an image, which has one frame; expected 17"
    assert choose_windows(IMAGE, clip(), "a.png", 0) == Rejected(reason, too_short=True)
    nothing = LONG._replace(frames=0, seconds=Fraction(1, 1000))
    assert isinstance(choose_windows(nothing, clip(short="cut"), "a.mp4", 0), Rejected)


@pytest.mark.parametrize(
    ("frames", "expected"), [(300, (81, 480, 832)), (100, (49, 480, 832)), (60, (17, 480, 832)), (20, (9, 480, 832))]
)
def test_the_longest_bucket_that_the_video_has(frames, expected):
    """The square bucket is short enough for every video, but has another aspect ratio."""
    sizes = ((17, 480, 832), (81, 480, 832), (49, 480, 832), (5, 64, 64))
    header = LONG._replace(frames=frames, seconds=Fraction(frames, 30))
    assert choose_windows(header, clip(buckets=sizes, short="cut"), "a.mp4", 0).bucket == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"fps": "native"}, [range(9)]),
        ({"fps": 8}, [range(0, 18, 2)]),
        ({"part": "centre"}, [range(15, 24)]),
        ({"part": "windows"}, [range(9), range(9, 18), range(18, 27), range(27, 36)]),
        ({"part": "windows", "fps": 8}, [range(0, 18, 2), range(18, 36, 2)]),
        ({"part": "windows", "fps": "native", "frames": 17}, [range(17), range(17, 34)]),
        ({"frames": 81, "short": "cut"}, [range(37)]),
    ],
)
@pytest.mark.parametrize(("suffix", "container"), [("mp4", "mp4"), ("mkv", "matroska")])
def test_the_frames_that_are_read(tmp_path, fields, expected, suffix, container):
    """A video of 40 frames at 16 frames a second, whose frames are numbered by their brightness."""
    path = encode(tmp_path / f"a.{suffix}", grey_clip(40), container=container)
    settings = clip(**({"frames": 9} | fields))
    chosen = choose_windows(read_header(path), settings, "a.mp4", 0)
    found = [which(pixels) for pixels in read_windows(path, chosen.starts, *chosen.bucket, settings.fps)]
    assert found == [list(numbers) for numbers in expected]
