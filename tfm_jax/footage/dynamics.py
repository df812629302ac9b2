"""Amount of motion."""

from fractions import Fraction

import numpy as np

from tfm_jax.footage.flow import optical_flow
from tfm_jax.footage.metric import Frame

RATE = 8
"""Frames per second between which motion is measured, as nearly as whole steps between frames allow."""
LARGEST = 0.05
"""Share of the pixels, those that move furthest, whose mean motion counts."""
THRESHOLD = 6 / 256
"""How much motion makes a pair of frames dynamic, as a share of the shorter side of the frame."""
DYNAMIC_PAIRS = 4 / 16
"""Number of dynamic pairs that make a video dynamic, divided by the number of frames."""


def step(fps: Fraction) -> int:
    """Return the distance between the frames that are compared."""
    return max(1, round(fps / RATE))


def frames_needed(fps: Fraction) -> int:
    """Return the smallest number of frames of a video that can be measured.

    Three frames are compared then: with two, the rule asks for round(0.5) = 0 dynamic pairs, so any video is dynamic.
    """
    return 2 * step(fps) + 1


class Dynamics:
    """Whether a video moves, by the rule of VBench's dynamic degree, and how fast.

    At about 8 frames per second, the motion of a pair of frames is the mean optical flow of the 5 % of its pixels that
    move furthest. A pair is dynamic if this exceeds 6 pixels, for a frame whose shorter side has 256, and a video is
    dynamic (1, else 0) if a quarter as many pairs are dynamic as frames are compared. VBench takes the flow from the
    network RAFT, and here it comes from OpenCV, so the two may disagree about a video near the threshold, with little
    texture or with very fast motion.

    The speed is the mean motion over the pairs, in pixels per frame of the video, which VBench does not report.
    """

    def __init__(self, fps: Fraction):
        self._step = step(fps)
        self._frames = 0
        self._last: np.ndarray | None = None
        self._compared = self._dynamic = 0
        self._sum = 0.0

    def add(self, frame: Frame) -> None:
        if self._frames % self._step == 0:
            self._compare(frame)
        self._frames += 1

    def _compare(self, frame: Frame) -> None:
        if self._last is not None:
            motion = largest_motion(self._last, frame)
            self._sum += motion
            self._dynamic += motion > THRESHOLD * min(frame.shape[:2])
        self._last = frame
        self._compared += 1

    def values(self) -> dict[str, float]:
        wanted = round(DYNAMIC_PAIRS * self._compared)
        return {
            "dynamic_degree_optical_flow": float(self._dynamic >= wanted),
            "speed_optical_flow": self._sum / (self._compared - 1) / self._step,
        }


def largest_motion(first: Frame, second: Frame) -> float:
    """Return the mean length of the optical flow over the pixels that move furthest, in pixels."""
    lengths = np.linalg.norm(optical_flow(first, second), axis=-1).ravel()
    count = int(LARGEST * lengths.size)
    return float(np.partition(lengths, -count)[-count:].mean())
