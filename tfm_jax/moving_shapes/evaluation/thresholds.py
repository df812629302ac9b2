"""All thresholds of the evaluation, fixed before any model was measured.

The tests use clips with known damage to show what each threshold lets through. `tfm-evaluate --json` lists all
thresholds by name.
"""

FAITHFUL = 0.5
"""In pixels: a clip obeys its law of motion if its physics residual is smaller. On real clips, tracking errors make the
residual about 0.05."""
MOVING = 0.3
"""In pixels per frame: an object moves if its mean speed is greater. In clips of the default size and frame rate, the
slowest moving object has a speed of 0.8."""
STILLNESS = 0.05
"""In pixels per frame: added to the denominator of the roughness, so that a frozen clip has a finite roughness."""
SECTOR = 22.5
"""In degrees: how far a motion may deviate from its direction to either side. This is half the angle between neighbours
among the eight directions."""

VISIBLE = 0.25
"""A pixel belongs to an object if its brightness is more than this fraction of the way from background to object."""
SOLID = 0.6
"""The same fraction for the pixels that decide which colours are present; edges, which codec and decoder blur, stay
below it."""
SOLID_LIKENESS = 0.95
"""For the pixels that decide which colours are present: the minimum cosine between (pixel - background) and
(colour - background). Between two different colours, the cosine is smaller."""
LIKENESS = 0.8
"""The minimum cosine for all pixels of an object. It is lower because 4:2:0 video, which keeps a quarter of the colour
samples, blurs the colours at edges."""
SPECK = 0.15
"""Area in squared radii: smaller parts of an object are ignored, and so are colours whose solid pixels cover less than
this. The smallest shape, a triangle, is 10 times as large."""
LARGEST = 2.0
"""In areas of a disc: anything whose median area over the frames is larger is noise or another background, not an
object."""
SHAPES_BY_FILL = {"triangle": 0.64, "disc": 0.89, "square": 1.01}
"""Shape -> upper limit of the filled fraction of its bounding box. The exact fractions are 1/2, pi/4 and 1; the limits
also suit blurred shapes."""

FASTEST = 1.0
"""In units per second: the highest speed, along an axis or on an orbit, among the starting points of a fit."""

SPLITS = 20
"""Number of random splits of the reference over which distances and floors are averaged."""
