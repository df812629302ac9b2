"""Temporal flickering."""

import numpy as np

from tfm_jax.footage.metric import Frame


class Flickering:
    """Temporal flickering as VBench defines it: 1 - MAE / 255.

    MAE is the mean absolute difference between neighbouring frames, over pixels, colours and pairs of frames.

    The score is 1 if nothing moves and falls with any change, motion included. VBench therefore asks users to keep only
    static videos first: its program `static_filter.py` removes videos in which the optical flow is large. Here all
    videos count, so that the score is only meaningful beside that of other videos with as much motion.
    """

    def __init__(self):
        self._last: np.ndarray | None = None
        self._sum, self._pairs = 0.0, 0

    def add(self, frame: Frame) -> None:
        pixels = frame.astype(np.int16)
        if self._last is not None:
            self._sum += float(np.abs(pixels - self._last).mean())
            self._pairs += 1
        self._last = pixels

    def values(self) -> dict[str, float]:
        return {"temporal_flickering": 1 - self._sum / self._pairs / 255}
