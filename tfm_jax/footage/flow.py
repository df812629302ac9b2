"""Optical flow between two frames, by OpenCV."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float

from tfm_jax.errors import InputError
from tfm_jax.footage.metric import Frame

SMALLEST_SIDE = 16
"""Smallest height and width in pixels; the pyramid of the method needs 12."""


@functools.cache
def opencv() -> Any:
    """Return the module cv2.

    Raises:
        InputError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise InputError("--vbench needs OpenCV, for optical flow; run pip install 'tfm-jax[footage]'") from None
    cv2.setNumThreads(1)  # the flow depends on the number of threads, each of which searches one part of the frame
    return cv2


def optical_flow(first: Frame, second: Frame) -> Float[np.ndarray, "y x 2"]:
    """Return how far each pixel of the first frame moves, in pixels: x, then y.

    The method is DIS (Kroeger et al., 2016) with OpenCV's preset "medium", on the brightness.
    """
    cv2 = opencv()
    return _estimator().calc(*(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)), None)


@functools.cache
def _estimator() -> Any:
    cv2 = opencv()
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def sample(frame: Frame, offset: Float[np.ndarray, "y x 2"]) -> Float[np.ndarray, "y x 3"]:
    """Return the colour that a frame has at each pixel's place plus an offset, between pixels by linear interpolation.

    Places outside the frame have the colour of its edge.
    """
    cv2 = opencv()
    height, width = frame.shape[:2]
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)
    places = (grid + offset).astype(np.float32)
    return cv2.remap(frame.astype(np.float32), places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
