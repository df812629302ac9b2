"""Smoothness of motion."""

import numpy as np
from jaxtyping import Float

from tfm_jax.footage.flow import optical_flow, sample
from tfm_jax.footage.metric import Frame


class Smoothness:
    """How well every second frame is predicted from its two neighbours: 1 - MAE / 255.

    The formula is that of VBench's motion smoothness: frames 1, 3, 5, ... are compared with frames interpolated between
    frames 0 and 2, 2 and 4, and so on. VBench interpolates with the network AMT-S. Here `middle_frame` does, from
    optical flow, so the values are not those of VBench: what is newly uncovered, and anything that moves further than
    its own size between two frames, is predicted worse.
    """

    def __init__(self):
        self._even: np.ndarray | None = None
        self._odd: np.ndarray | None = None
        self._sum, self._count = 0.0, 0

    def add(self, frame: Frame) -> None:
        if self._even is None:
            self._even = frame
        elif self._odd is None:
            self._odd = frame
        else:
            self._sum += float(np.abs(middle_frame(self._even, frame) - self._odd).mean())
            self._count += 1
            self._even, self._odd = frame, None

    def values(self) -> dict[str, float]:
        return {"smoothness_optical_flow": 1 - self._sum / self._count / 255}


def middle_frame(before: Frame, after: Frame) -> Float[np.ndarray, "y x 3"]:
    """Interpolate the frame halfway between two frames.

    A pixel of the new frame was half its motion away in the frame before, and will be half its motion away in the frame
    after. Flow is known where things are before and where they are after, but not halfway. So both flows are tried at
    each pixel, and the one for which the two frames agree better is used. The colour is the mean of the two frames.
    """
    candidates = []
    for motion in (optical_flow(before, after), -optical_flow(after, before)):
        ends = sample(before, -motion / 2), sample(after, motion / 2)
        candidates.append((np.abs(ends[0] - ends[1]).sum(-1, keepdims=True), (ends[0] + ends[1]) / 2))
    (error, colour), (other_error, other_colour) = candidates
    return np.where(error <= other_error, colour, other_colour).round()
