"""Tracks the objects in a clip: assigns pixels to colours, then finds mass, centre, parts and shape of each object."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.scene import BACKGROUNDS, COLOURS, RADIUS

WINDOW = 5
"""Side, in pixels, of the window over which a colour is averaged."""

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""Weights of red, green and blue in the brightness, which video stores at full resolution (BT.709)."""

Pixels = UInt8[np.ndarray, "t y x 3"]


class Track(NamedTuple):
    """The object of one colour, from the first frame to the last."""

    colour: str
    mass: Float[np.ndarray, "t"]
    """Area in pixels, the sum of the fractions from `segment`."""
    centres: Float[np.ndarray, "t 2"]
    """(x, y) in pixels from the upper left corner; NaN in frames without the colour."""
    parts: Int[np.ndarray, "t"]
    """Number of connected components, not counting specks."""
    shape: str
    """Judged by the median, over the frames, of the filled fraction of the bounding box."""


def track(clip: Pixels) -> list[Track]:
    """Return one track for each colour that is visible as an object, the largest first."""
    disc = np.pi * (RADIUS * min(clip.shape[1:3])) ** 2
    tracks = [_make_track(colour, weights) for colour, weights in segment(clip).items()]
    tracks = [track for track in tracks if np.median(track.mass) <= thresholds.LARGEST * disc]
    return sorted(tracks, key=lambda track: -track.mass.mean())


def segment(clip: Pixels) -> dict[str, Float[np.ndarray, "t y x"]]:
    """Map each visible colour to the fraction of every pixel that it covers; fractions up to VISIBLE are set to 0.

    If an object covers the fraction a of a pixel, the pixel's value is background + a (colour - background). The
    brightness of the pixel gives a, and the colour is the one whose ray from the background is closest. Video stores
    colour at half the resolution, so a single pixel at an edge can have a wrong colour; therefore the mean of the
    surrounding pixels decides.
    """
    background = find_background(clip)
    light = clip - background
    around = ndimage.uniform_filter(light, WINDOW, axes=(1, 2))
    rays = np.array(list(COLOURS.values()), np.float32) - background
    shares, likeness = _project(light, rays)
    solid = (shares > thresholds.SOLID) & _is_closest(likeness, thresholds.SOLID_LIKENESS)
    solid &= _is_closest(_project(around, rays)[1], thresholds.SOLID_LIKENESS)
    present = np.flatnonzero(solid.sum((2, 3)).max(1) >= _speck(*clip.shape[1:3]))
    if not len(present):
        return {}
    seen = _is_closest(_project(around, rays[present])[1], thresholds.LIKENESS)
    weights = np.where(seen & (shares[present] > thresholds.VISIBLE), shares[present].clip(0, 1), 0)
    return {list(COLOURS)[colour]: weight for colour, weight in zip(present, weights, strict=True)}


def find_background(clip: Pixels) -> Float[np.ndarray, "3"]:
    """Return the background with the smallest median difference; objects never cover half of the picture."""
    backgrounds = list(np.array(list(BACKGROUNDS.values()), np.float32))
    return min(backgrounds, key=lambda background: float(np.median(abs(clip - background).sum(-1))))


def _project(
    light: Float[np.ndarray, "t y x 3"], rays: Float[np.ndarray, "k 3"]
) -> tuple[Float[np.ndarray, "k t y x"], Float[np.ndarray, "k t y x"]]:
    """Return the ratio of brightness between each pixel and each ray, and the cosine of the angle between them."""
    along = np.einsum("tyxc,kc->ktyx", light, rays)
    lengths, brightness = (each[:, None, None, None] for each in (np.linalg.norm(rays, axis=-1), rays @ LUMA))
    return (light @ LUMA) / brightness, along / lengths / np.linalg.norm(light, axis=-1).clip(1e-3)


def _is_closest(likeness: Float[np.ndarray, "k t y x"], least: float) -> Bool[np.ndarray, "k t y x"]:
    return (likeness > least) & (likeness == likeness.max(0))


def _speck(height: int, width: int) -> float:
    """Return SPECK in pixels."""
    return thresholds.SPECK * (RADIUS * min(height, width)) ** 2


def _make_track(colour: str, weights: Float[np.ndarray, "t y x"]) -> Track:
    """Compute the track of a colour from the fraction of every pixel that it covers."""
    _, height, width = weights.shape
    mass = weights.sum((1, 2))
    moments = np.stack([weights.sum(1) @ (np.arange(width) + 0.5), weights.sum(2) @ (np.arange(height) + 0.5)], -1)
    centres = np.where(mass[:, None] > 0, moments / mass[:, None].clip(1e-9), np.nan)
    parts = np.array([_count_parts(frame > 0, _speck(height, width)) for frame in weights])
    fill = np.median([_fill(frame > 0.5) for frame in weights])
    shape = next(shape for shape, limit in thresholds.SHAPES_BY_FILL.items() if fill < limit)
    return Track(colour, mass.astype(np.float64), centres.astype(np.float64), parts, shape)


def _count_parts(mask: Bool[np.ndarray, "y x"], least: float) -> int:
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, structure=np.ones((3, 3)), output=labels)
    return int((np.bincount(labels.ravel())[1:] >= least).sum())


def _fill(mask: Bool[np.ndarray, "y x"]) -> float:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0.0
    return float(mask.sum() / ((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)))
