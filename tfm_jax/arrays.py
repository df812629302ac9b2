"""Named array types. The letters of all axes are defined here:

b: videos in a batch          f: latent frames (pixel frames = 4 (f - 1) + 1)
h, w: latent height, width    c: latent channels (16)
t, y, x: pixel frames, height (8 h), width (8 w)
l: text tokens (512)          d: width of the text embedding (4096)
s: tokens of the transformer: f * (h / 2) * (w / 2)
"""

from jaxtyping import Array, Float, Int

TEXT_LENGTH = 512
"""Tokens per prompt in the training of Wan, including the end-of-sequence token."""

Latents = Float[Array, "b f h w c"]
Video = Float[Array, "b t y x 3"]
Text = Float[Array, "b l d"]
TokenIds = Int[Array, "b l"]
TokenMask = Int[Array, "b l"]
PerVideo = Float[Array, "b"]
PerFrame = Float[Array, "b f"]
Scalar = Float[Array, ""]
