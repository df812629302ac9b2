"""Overlays frames of a clip in one picture, as a stroboscope does on a photograph."""

import numpy as np
from jaxtyping import UInt8

from tfm_jax.moving_shapes.evaluation.tracking import Pixels, find_background

FAINTEST = 0.3
"""Opacity of the objects in the first frame; those in the last one are opaque."""
SAME, OTHER = 20, 60
"""A pixel whose greatest difference from the background, among its colours, is SAME of 255 or less belongs to the
background; from OTHER on, it belongs to an object."""


def overlay(clip: Pixels, count: int) -> UInt8[np.ndarray, "y x 3"]:
    """Return the background with the objects of `count` evenly spaced frames, the later ones over the earlier ones."""
    background = find_background(clip)
    picture = np.broadcast_to(background, clip.shape[1:])
    picks = np.linspace(0, len(clip) - 1, count).round().astype(int)
    for pick, opacity in zip(picks, np.linspace(FAINTEST, 1, count), strict=True):
        difference = abs(clip[pick] - background).max(-1, keepdims=True)
        cover = ((difference - SAME) / (OTHER - SAME)).clip(0, 1)
        picture = picture + opacity * cover * (clip[pick] - picture)
    return picture.round().astype(np.uint8)
