"""Renders objects with antialiased edges."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from tfm_jax.moving_shapes.scene import BACKGROUNDS, COLOURS, ClipSpec, SceneObject


def render(
    objects: Sequence[SceneObject], positions: Float[np.ndarray, "n t 2"], background: str, spec: ClipSpec
) -> UInt8[np.ndarray, "t y x 3"]:
    """Paint the objects, in their order, over the background of every frame."""
    height, width = spec.size
    canvas = np.broadcast_to(paint_background(background, height), (spec.frames, height, width, 3))
    for obj, centres in zip(objects, positions, strict=True):
        cover = pixel_coverage(obj.shape, centres, spec)[..., None]
        canvas = canvas + cover * (np.array(COLOURS[obj.colour]) - canvas)
    return np.round(canvas).astype(np.uint8)


def paint_background(background: str, height: int) -> Float[np.ndarray, "y 1 3"]:
    """Return the colour of every row."""
    top, bottom = (np.array(colour, np.float64) for colour in BACKGROUNDS[background])
    return (top + np.linspace(0, 1, height)[:, None] * (bottom - top))[:, None]


def pixel_coverage(shape: str, centres: Float[np.ndarray, "t 2"], spec: ClipSpec) -> Float[np.ndarray, "t y x"]:
    """Return the fraction of each pixel that a shape covers.

    A shape extends at most one radius along x and y from its centre of mass.
    """
    height, width = spec.size
    r = spec.radius
    x = np.arange(width) + 0.5 - centres[:, 0, None, None]
    y = np.arange(height)[:, None] + 0.5 - centres[:, 1, None, None]
    if shape == "disc":
        return (r - np.hypot(x, y) + 0.5).clip(0, 1)
    if shape == "square":  # has the same area as the disc
        half = r * np.sqrt(np.pi) / 2
        return (half - abs(x) + 0.5).clip(0, 1) * (half - abs(y) + 0.5).clip(0, 1)
    sides = (r + y - 1.5 * abs(x)) / np.hypot(1, 1.5)  # corners at (0, -r) and (+-r, r / 2)
    return (np.minimum(sides, r / 2 - y) + 0.5).clip(0, 1)
