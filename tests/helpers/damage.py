"""Known damage to clips, for testing which metric detects what. Each function maps (clip, rng) to a damaged clip."""

import numpy as np
from scipy import ndimage


def shuffled(clip, rng):
    return clip[rng.permutation(len(clip))]


def frozen(clip, rng):
    return np.repeat(clip[:1], len(clip), 0)


def jittered(clip, rng, pixels=1):
    """Move every frame by up to `pixels` along each axis, extending the edges."""
    moved = []
    for frame, (dy, dx) in zip(clip, rng.integers(-pixels, pixels + 1, (len(clip), 2)), strict=True):
        wide = np.pad(frame, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
        moved.append(wide[pixels + dy :, pixels + dx :][: clip.shape[1], : clip.shape[2]])
    return np.stack(moved)


def swapped(clip, rng, pairs=2):
    """Swap the two frames of some pairs of neighbours."""
    order = np.arange(len(clip))
    for first in rng.choice(np.arange(0, len(clip) - 1, 2), pairs, replace=False):
        order[[first, first + 1]] = order[[first + 1, first]]
    return clip[order]


def ghosting(clip, rng, delay=6, strength=0.45):
    """Let an earlier frame shine through."""
    ghost = clip[np.maximum(np.arange(len(clip)) - delay, 0)]
    return np.maximum(clip, (strength * ghost).astype(np.uint8))


def fading(clip, rng, left=0.6):
    """Darken the clip gradually, down to the fraction `left` of its brightness."""
    return (clip * np.linspace(1, left, len(clip))[:, None, None, None]).astype(np.uint8)


def vanishing(clip, rng):
    """Remove the objects from one random frame."""
    clip = clip.copy()
    clip[rng.integers(len(clip))] = np.median(clip, (0, 2))[:, None]
    return clip


def noisy(clip, rng, sigma=5):
    """Add mild pixel noise, in units of 0..255."""
    return (clip + rng.normal(0, sigma, clip.shape)).round().clip(0, 255).astype(np.uint8)


def blurred(clip, rng, sigma=1.0):
    """Blur the clip as much as a small decoder does."""
    return ndimage.gaussian_filter(clip, (0, sigma, sigma, 0))


DAMAGES = (shuffled, frozen, jittered, swapped, ghosting, fading, vanishing, noisy, blurred)
