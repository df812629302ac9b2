"""Metrics of footage: formulas against plain NumPy, and clips with known answers."""

import itertools
import weakref
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tfm_jax.footage import dynamics, smoothness
from tfm_jax.footage.dynamics import Dynamics, frames_needed, largest_motion, step
from tfm_jax.footage.flickering import Flickering
from tfm_jax.footage.smoothness import Smoothness, middle_frame

RATE = Fraction(16)


def texture(height: int, width: int, seed: int) -> np.ndarray:
    """A pattern of soft blobs, in which motion is visible everywhere."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def moving_square(velocity: tuple[int, int], frames: int = 9, side: int = 40) -> list[np.ndarray]:
    """A square that moves at constant velocity (y, x), in pixels per frame, over ground that stands still."""
    clip = []
    for t in range(frames):
        frame = texture(96, 128, 0).copy()
        top, left = (8 + speed * t for speed in velocity)
        frame[top : top + side, left : left + side] = texture(side, side, 1)
        clip.append(frame)
    return clip


def noise(frames: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (frames, 64, 64, 3)).astype(np.uint8))


def measured(metric, clip) -> dict[str, float]:
    for frame in clip:
        metric.add(frame)
    return metric.values()


# --- Flickering ------------------------------------------------------------------------------------------------------


def test_flickering_against_the_formula():
    clip = [frame[:20, :30] for frame in noise(5)]
    errors = [np.mean(np.abs(a.astype(float) - b.astype(float))) for a, b in itertools.pairwise(clip)]
    expected = (255 - np.mean(errors)) / 255
    assert measured(Flickering(), clip) == {"temporal_flickering": pytest.approx(expected, abs=1e-12)}


def test_flickering_of_white_noise():
    """Two independent numbers from 0 to 255 differ by (256^2 - 1) / (3 * 256) on average."""
    expected = 1 - (256**2 - 1) / (3 * 256) / 255
    assert measured(Flickering(), noise(9))["temporal_flickering"] == pytest.approx(expected, abs=0.003)


def test_a_still_clip():
    clip = [texture(64, 64, 0)] * 5
    found = {name: value for metric in metrics() for name, value in measured(metric, clip).items()}
    assert found == {
        "temporal_flickering": 1,
        "smoothness_optical_flow": 1,
        "dynamic_degree_optical_flow": 0,
        "speed_optical_flow": 0,
    }


def metrics() -> list:
    return [Flickering(), Smoothness(), Dynamics(RATE)]


def test_no_metric_keeps_more_than_a_few_frames():
    found, refs = metrics(), []
    for seed in range(12):
        frame = texture(32, 32, seed).copy()
        refs.append(weakref.ref(frame))
        for metric in found:
            metric.add(frame)
    del frame
    assert sum(ref() is not None for ref in refs) <= 3


# --- Smoothness ------------------------------------------------------------------------------------------------------


def test_every_second_frame_is_compared(monkeypatch):
    """Frames 0 and 2 predict frame 1, and frames 2 and 4 frame 3; frame 5 has no second neighbour."""
    monkeypatch.setattr(smoothness, "middle_frame", lambda a, b: (a.astype(float) + b) / 2)
    clip = [np.full((2, 2, 3), value, np.uint8) for value in (0, 10, 40, 50, 80, 255)]
    assert measured(Smoothness(), clip) == {"smoothness_optical_flow": pytest.approx(1 - 10 / 255)}


def test_the_middle_frame_of_a_pan():
    scene = texture(64, 128, 3)
    before, between, after = (scene[:, shift : shift + 96] for shift in (0, 3, 6))
    inside = np.abs(middle_frame(before, after) - between)[8:-8, 8:-8]
    assert inside.mean() < 1.5
    assert np.abs((before.astype(float) + after) / 2 - between)[8:-8, 8:-8].mean() > 8  # a blend does not show motion


def test_constant_velocity_is_smooth_and_jumps_are_not():
    def score(clip) -> float:
        return measured(Smoothness(), clip)["smoothness_optical_flow"]

    clip = moving_square((2, 3))
    jumping = [clip[number] for number in (0, 6, 2, 8, 1, 7, 3, 5, 4)]
    assert score(clip) > 0.995
    assert score(jumping) < 0.975
    assert score(noise(5)) < 0.8


# --- Amount of motion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("velocity", "fps"), [((3, 4), 8), ((0, 2), 16), ((1, 1), 30)])
def test_the_speed_of_a_square(velocity, fps):
    clip = moving_square(velocity, frames=9)
    found = measured(Dynamics(Fraction(fps)), clip)["speed_optical_flow"]
    assert found == pytest.approx(np.hypot(*velocity), rel=0.03)


def test_the_pixels_that_move_furthest(monkeypatch):
    flow = np.random.default_rng(0).normal(size=(30, 41, 2))
    monkeypatch.setattr(dynamics, "optical_flow", lambda first, second: flow)
    lengths = np.sort(np.sqrt((flow**2).sum(-1)).ravel())[::-1]
    assert largest_motion(np.zeros((30, 41, 3), np.uint8), np.zeros((30, 41, 3), np.uint8)) == pytest.approx(
        lengths[: int(30 * 41 * 0.05)].mean()
    )


@pytest.mark.parametrize(
    ("frames", "fps", "fast", "dynamic"),
    [
        (17, 16, 1, 0),  # 9 frames are compared, so round(9 / 4) = 2 fast pairs are wanted
        (17, 16, 2, 1),
        (17, 8, 3, 0),  # 17 frames: round(17 / 4) = 4
        (17, 8, 4, 1),
        (5, 16, 0, 0),  # 3 frames: round(3 / 4) = 1
        (5, 16, 1, 1),
    ],
)
def test_the_rule_for_a_dynamic_video(monkeypatch, frames, fps, fast, dynamic):
    """The threshold for frames of 64 x 128 pixels is 6 * 64 / 256 = 1.5 pixels."""
    motions = iter([1.51] * fast + [1.49] * frames)
    monkeypatch.setattr(dynamics, "largest_motion", lambda first, second: next(motions))
    found = measured(Dynamics(Fraction(fps)), [np.zeros((64, 128, 3), np.uint8)] * frames)
    assert found["dynamic_degree_optical_flow"] == dynamic
    pairs = (frames - 1) // step(Fraction(fps))
    assert found["speed_optical_flow"] == pytest.approx((1.49 * pairs + 0.02 * fast) / pairs / step(Fraction(fps)))


@pytest.mark.parametrize(("fps", "expected"), [(1, 1), (8, 1), (12, 2), (16, 2), ("24000/1001", 3), (30, 4), (60, 8)])
def test_frames_are_compared_at_about_8_per_second(fps, expected):
    assert step(Fraction(fps)) == expected
    assert frames_needed(Fraction(fps)) == 2 * expected + 1
