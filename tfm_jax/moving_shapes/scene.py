"""The vocabulary and the constants of the world of moving shapes, and the types that describe a clip.

The unit of length is the shorter side of the picture (`ClipSpec.unit` pixels); the unit of time is the second.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

# --- Vocabulary ------------------------------------------------------------------------------------------------------

SHAPES = ("disc", "square", "triangle")
COLOURS = {
    "red": (232, 44, 40),
    "green": (44, 190, 76),
    "blue": (54, 96, 240),
    "yellow": (236, 208, 36),
    "purple": (206, 60, 214),
    "white": (236, 236, 236),
}
BACKGROUNDS = {"black": (14, 14, 16), "grey": (50, 50, 54), "navy": (16, 22, 56)}

DIRECTIONS = {
    "right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1),
    "up and right": (1, -1), "up and left": (-1, -1), "down and right": (1, 1), "down and left": (-1, 1),
}  # fmt: skip
"""Name -> (x, y), with y downwards."""
HORIZONTAL = ("right", "left")
ROTATIONS = {"clockwise": 1, "counterclockwise": -1}

SPEEDS = {"slowly": (0.20, 0.34), "fast": (0.46, 0.65)}
"""Pace -> range of the speed at the start of a clip, in units per second."""
HELD_OUT_SPEEDS = {"slowly": (0.34, 0.40), "fast": (0.40, 0.46)}
"""Drawn only on request, to test a model at speeds between those of its training clips."""

LAWS = {
    "still": "stands still",
    "uniform": "moves",
    "bouncing": "bounces off the walls, first",
    "gravity": "falls and bounces off the floor, drifting",
    "orbit": "circles",
    "collision": "moves",
    "returning": "turns back after moving",
}
"""Law of motion -> its verb phrase in captions."""
COLLISION_CLAUSE = ", and collides with "

FIXED_COUNTS = {"collision": 2, "gravity": 1}
"""Law -> number of objects, if the law fixes it. Gravity has one: two falling, drifting objects rarely stay apart."""

# --- Geometry and physics --------------------------------------------------------------------------------------------

RADIUS = 0.16
"""Half the size of a shape, in units. The centre of a shape stays at least this far from the edges of the picture."""
EDGE = 1 / 32
"""Width of the soft edge of a shape, in units: 2 pixels in clips of the default size. With a soft edge, a small
autoencoder can represent positions between pixels."""
GRAVITY = 1.5
"""In units per second squared: a fall from the ceiling to the floor takes 0.95 seconds."""
DROP_HEIGHTS = (0.35, 0.8)
"""Range of the height from which an object falls, as a fraction of the space between floor and ceiling."""
RETURN = 1.2
"""Deceleration of an object that turns back, against its first direction, in units per second squared: it turns within
0.55 seconds."""
ORBIT_RADII = (0.20, 0.34)
"""Range of the radius of an orbit, in units."""
CONTACT_TIMES = (0.25, 0.75)
"""Range of the time of the first contact with a wall or another object, as a fraction of the clip (or of the time to
cross the picture, if that is shorter)."""
MIN_IMPACT_SPEED = 0.3
"""In units per second: two objects approach each other at least this fast along the line through their centres, because
a slower collision would hardly be visible."""
CLEARANCE = 2.6
"""Minimum distance, in radii, between the centres of objects that do not collide, so that no shape covers another."""


class SceneObject(NamedTuple):
    """An object as its caption describes it."""

    colour: str
    shape: str
    direction: str
    """A key of DIRECTIONS (at the start of the clip) or of ROTATIONS; empty if the object stands still."""
    pace: str
    """A key of SPEEDS; empty if the object stands still."""


class Scene(NamedTuple):
    """A clip and its ground truth."""

    pixels: UInt8[np.ndarray, "t y x 3"]
    caption: str
    law: str
    background: str
    objects: tuple[SceneObject, ...]
    speeds: tuple[float, ...]
    """Speed of every object in units per second: under gravity, the horizontal speed; in a collision, the speed before
    the contact."""
    positions: Float[np.ndarray, "n t 2"]
    """Centre (x, y) of every object in every frame, in pixels from the upper left corner of the picture."""


class ClipSpec(NamedTuple):
    """Number of frames, size and frame rate of a clip, and the world's constants in pixels and frames.

    The defaults are those of the clips that the embedded model was trained on.
    """

    frames: int = 17
    size: tuple[int, int] = (64, 64)
    """Height and width in pixels."""
    fps: float | int = 16

    @property
    def unit(self) -> int:
        """The unit of length in pixels: the shorter side of the picture."""
        return min(self.size)

    @property
    def radius(self) -> float:
        """RADIUS in pixels."""
        return RADIUS * self.unit

    @property
    def extent(self) -> Float[np.ndarray, "2"]:
        """Width and height (x, y), in pixels, of the area that the centre of an object can reach between the walls."""
        return np.array([self.size[1], self.size[0]]) - 2 * self.radius

    @property
    def gravity(self) -> float:
        """GRAVITY in pixels per frame squared."""
        return GRAVITY * self.unit / self.fps**2

    @property
    def deceleration(self) -> float:
        """RETURN in pixels per frame squared."""
        return RETURN * self.unit / self.fps**2

    @property
    def times(self) -> Float[np.ndarray, "t"]:
        """The time of every frame, measured in frames: 0, 1, ..."""
        return np.arange(float(self.frames))
