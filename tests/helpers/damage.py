"""Clips damaged in known ways, to see which metric notices what. Each function: (clip, random generator) -> clip."""

import numpy as np
from scipy import ndimage


def shuffled(clip, rng):
    return clip[rng.permutation(len(clip))]


def frozen(clip, rng):
    return np.repeat(clip[:1], len(clip), 0)


def jittered(clip, rng, pixels=1):
    """Every frame moved by up to a pixel along each axis, the ground filling up."""
    moved = []
    for frame, (dy, dx) in zip(clip, rng.integers(-pixels, pixels + 1, (len(clip), 2)), strict=True):
        wide = np.pad(frame, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
        moved.append(wide[pixels + dy :, pixels + dx :][: clip.shape[1], : clip.shape[2]])
    return np.stack(moved)


def swapped(clip, rng, pairs=2):
    """Two pairs of neighbouring frames in the wrong order."""
    order = np.arange(len(clip))
    for first in rng.choice(np.arange(0, len(clip) - 1, 2), pairs, replace=False):
        order[[first, first + 1]] = order[[first + 1, first]]
    return clip[order]


def ghosting(clip, rng, delay=6, strength=0.45):
    """The frame of a while ago shines through."""
    ghost = clip[np.maximum(np.arange(len(clip)) - delay, 0)]
    return np.maximum(clip, (strength * ghost).astype(np.uint8))


def fading(clip, rng, left=0.6):
    """The object goes dark in the course of the clip, the ground with it."""
    return (clip * np.linspace(1, left, len(clip))[:, None, None, None]).astype(np.uint8)


def vanishing(clip, rng):
    """One frame without anything in it."""
    clip = clip.copy()
    clip[rng.integers(len(clip))] = np.median(clip, (0, 2))[:, None]
    return clip


def noisy(clip, rng, sigma=5):
    """Mild pixel noise, in values of 0..255."""
    return (clip + rng.normal(0, sigma, clip.shape)).round().clip(0, 255).astype(np.uint8)


def blurred(clip, rng, sigma=1.0):
    """As soft as a small decoder makes it."""
    return ndimage.gaussian_filter(clip, (0, sigma, sigma, 0))


DAMAGES = (shuffled, frozen, jittered, swapped, ghosting, fading, vanishing, noisy, blurred)
