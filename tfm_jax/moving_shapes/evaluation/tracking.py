"""Where the objects of a clip are: pixels by colour, and from them centre, mass, parts and shape in every frame."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.world import COLOURS, GROUNDS, RADIUS, paint_ground

AROUND = 5
"""Pixels along each axis from which a colour is read."""

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""Brightness of red, green and blue: what video keeps at full resolution (BT.709)."""

Pixels = UInt8[np.ndarray, "t y x 3"]


class Track(NamedTuple):
    """One colour, from the first frame to the last."""

    colour: str
    mass: Float[np.ndarray, "t"]
    """Pixels, a partly covered one by its share."""
    centres: Float[np.ndarray, "t 2"]
    """(x, y) in pixels from the upper left corner; NaN where the colour is not seen."""
    parts: Int[np.ndarray, "t"]
    """Connected components, specks left out."""
    shape: str
    """By the share of the bounding box that is filled, in the median frame."""


def track(clip: Pixels) -> list[Track]:
    """One track for each colour of the palette that is in the clip as an object, the largest first."""
    disc = np.pi * (RADIUS * min(clip.shape[1:3])) ** 2
    tracks = [_follow(colour, weights) for colour, weights in segment(clip).items()]
    tracks = [track for track in tracks if np.median(track.mass) <= thresholds.LARGEST * disc]
    return sorted(tracks, key=lambda track: -track.mass.mean())


def segment(clip: Pixels) -> dict[str, Float[np.ndarray, "t y x"]]:
    """Colour -> how much of each pixel it covers, where that exceeds VISIBLE; 0 elsewhere.

    A pixel of which the share a is covered is ground + a (colour - ground): a follows from its brightness, and the
    colour is the one whose ray from the ground is closest. Video keeps colour at half the resolution, so that single
    pixels at an edge have a wrong one: it is read from the mean of the pixels around.
    """
    light = clip - _find_ground(clip)
    around = ndimage.uniform_filter(light, AROUND, axes=(1, 2))
    rays = _rays(clip, list(COLOURS))
    shares, likeness = _project(light, rays)
    solid = (shares > thresholds.SOLID) & _is_closest(likeness, thresholds.SOLID_LIKENESS)
    solid &= _is_closest(_project(around, rays)[1], thresholds.SOLID_LIKENESS)
    present = np.flatnonzero(solid.sum((2, 3)).max(1) >= _speck(*clip.shape[1:3]))
    if not len(present):
        return {}
    seen = _is_closest(_project(around, rays[present])[1], thresholds.LIKENESS)
    weights = np.where(seen & (shares[present] > thresholds.VISIBLE), shares[present].clip(0, 1), 0)
    return {list(COLOURS)[colour]: weight for colour, weight in zip(present, weights, strict=True)}


def _find_ground(clip: Pixels) -> Float[np.ndarray, "y 1 3"]:
    """The ground of the world that the median pixel is closest to; objects never cover half of the picture."""
    grounds = [paint_ground(name, clip.shape[1]).astype(np.float32) for name in GROUNDS]
    return min(grounds, key=lambda ground: float(np.median(abs(clip - ground).sum(-1))))


def _rays(clip: Pixels, names: list[str]) -> Float[np.ndarray, "k y 3"]:
    """From the ground to each colour, row by row."""
    return np.array([COLOURS[name] for name in names], np.float32)[:, None] - _find_ground(clip)[:, 0]


def _project(
    light: Float[np.ndarray, "t y x 3"], rays: Float[np.ndarray, "k y 3"]
) -> tuple[Float[np.ndarray, "k t y x"], Float[np.ndarray, "k t y x"]]:
    """Every pixel on each ray: how far along it by brightness, and the cosine of the angle to it."""
    along = np.einsum("tyxc,kyc->ktyx", light, rays)
    lengths = np.linalg.norm(rays, axis=-1)[:, None, :, None]
    return (light @ LUMA) / (rays @ LUMA)[:, None, :, None], along / lengths / np.linalg.norm(light, axis=-1).clip(1e-3)


def _is_closest(likeness: Float[np.ndarray, "k t y x"], least: float) -> Bool[np.ndarray, "k t y x"]:
    return (likeness > least) & (likeness == likeness.max(0))


def _speck(height: int, width: int) -> float:
    """Pixels."""
    return thresholds.SPECK * (RADIUS * min(height, width)) ** 2


def _follow(colour: str, weights: Float[np.ndarray, "t y x"]) -> Track:
    """Centre of mass and connected components in every frame."""
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
