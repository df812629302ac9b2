"""Every threshold of the evaluation, fixed before any model was measured.

The tests show on clips with known damage what each of them lets through.
"""

FAITHFUL = 0.5
"""Pixels: a clip keeps to a law of motion if its physics residual is below. Tracking real clips errs by about 0.05."""
MOVING = 0.3
"""Pixels a frame: an object moves if its mean speed is above. The slowest one of the world moves by 0.8."""
STILLNESS = 0.05
"""Pixels a frame, added below the line of the smoothness so that it is finite for a frozen clip."""
SECTOR = 22.5
"""Degrees to either side of a direction: half the distance between two of the eight."""

VISIBLE = 0.25
"""Share of the way from the ground to the object's colour above which a pixel is part of the object."""
SOLID = 0.6
"""The same share for pixels that say which colours there are: edges, blurred by codec and decoder, stay below."""
SOLID_LIKENESS = 0.95
"""Least cosine between (pixel - ground) and (colour - ground) there; between two colours of the palette it is less."""
LIKENESS = 0.8
"""The same for pixels at the edge, where 4:2:0 video keeps a quarter of the colour."""
SPECK = 0.15
"""Parts of an object smaller than this many squared radii are not counted, nor colours of fewer solid pixels: 8 times
less than the smallest shape."""
LARGEST = 2.0
"""Discs: what is larger than this in the median frame is no object but another ground, or noise."""
SHAPES_BY_FILL = {"triangle": 0.64, "disc": 0.89, "square": 1.01}
"""Shape -> upper end of the share of its bounding box that is filled (1/2, pi/4 and 1, blurred or not)."""

FASTEST = 1.0
"""Widths a second: greatest speed along an axis, and of an orbit, that is tried as a start of the search for a path."""

SPLITS = 20
"""Random splits of the reference into halves over which the measuring floor is averaged."""
