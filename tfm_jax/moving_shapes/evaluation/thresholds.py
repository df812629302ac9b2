"""All thresholds of the evaluation, fixed before any model was measured.

The tests show on clips with known damage what each of them lets through. evaluation.json lists them by name.
"""

FAITHFUL = 0.5
"""Pixels: a clip obeys its law of motion if its physics residual is smaller. Tracking errors on real clips are 0.05."""
MOVING = 0.3
"""Pixels per frame: an object moves if its mean speed is greater. The slowest object of the world moves at 0.8."""
STILLNESS = 0.05
"""Pixels per frame, added to the denominator of the roughness so that it is finite for a frozen clip."""
SECTOR = 22.5
"""Degrees to either side of a direction: half the angle between two of the eight directions."""

VISIBLE = 0.25
"""A pixel belongs to an object if its value is more than this fraction of the way from background to object colour."""
SOLID = 0.6
"""The same for pixels that decide which colours are present; edges, blurred by codec and decoder, stay below it."""
SOLID_LIKENESS = 0.95
"""Least cosine between (pixel - background) and (colour - background) of those pixels; two colours have less."""
LIKENESS = 0.8
"""The same for pixels at an edge, where 4:2:0 video keeps a quarter of the colour samples."""
SPECK = 0.15
"""In squared radii: smaller parts of an object are ignored, and so are colours with fewer solid pixels. The smallest
shape is 8 times as large."""
LARGEST = 2.0
"""In areas of a disc: anything larger in the median frame is a different background or noise, not an object."""
SHAPES_BY_FILL = {"triangle": 0.64, "disc": 0.89, "square": 1.01}
"""Shape -> upper limit of the filled fraction of its bounding box (1/2, pi/4 and 1, with or without blur)."""

FASTEST = 1.0
"""Units per second: the greatest speed, along an axis or on an orbit, among the starting points of the path search."""

SPLITS = 20
"""Number of random splits of the reference into halves over which the floor is averaged."""
