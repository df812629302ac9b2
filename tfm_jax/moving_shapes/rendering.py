"""Renders objects with soft edges."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from tfm_jax.moving_shapes.scene import BACKGROUNDS, COLOURS, EDGE, ClipSpec, SceneObject


def render(
    objects: Sequence[SceneObject], positions: Float[np.ndarray, "n t 2"], background: str, spec: ClipSpec
) -> UInt8[np.ndarray, "t y x 3"]:
    """Paint the objects, in their order, over the background of every frame."""
    canvas = np.broadcast_to(np.array(BACKGROUNDS[background], np.float64), (spec.frames, *spec.size, 3))
    for obj, centres in zip(objects, positions, strict=True):
        cover = pixel_coverage(obj.shape, centres, spec)[..., None]
        canvas = canvas + cover * (np.array(COLOURS[obj.colour]) - canvas)
    return np.round(canvas).astype(np.uint8)


def pixel_coverage(shape: str, centres: Float[np.ndarray, "t 2"], spec: ClipSpec) -> Float[np.ndarray, "t y x"]:
    """Return the opacity of a shape at every pixel: 1 inside, 0 outside, and a linear ramp of width EDGE between.

    Up to half the ramp, a shape extends at most one radius along x and y from its centre of mass.
    """
    height, width = spec.size
    r = spec.radius
    x = np.arange(width) + 0.5 - centres[:, 0, None, None]
    y = np.arange(height)[:, None] + 0.5 - centres[:, 1, None, None]

    def ramp(depth: Float[np.ndarray, "t y x"]) -> Float[np.ndarray, "t y x"]:
        """Return the opacity at a given depth, in pixels, inside an edge."""
        return (depth / max(1.0, EDGE * spec.unit) + 0.5).clip(0, 1)

    if shape == "disc":
        return ramp(r - np.hypot(x, y))
    if shape == "square":  # has the same area as the disc
        half = r * np.sqrt(np.pi) / 2
        return ramp(half - abs(x)) * ramp(half - abs(y))
    sides = (r + y - 1.5 * abs(x)) / np.hypot(1, 1.5)  # corners at (0, -r) and (+-r, r / 2)
    return ramp(np.minimum(sides, r / 2 - y))
