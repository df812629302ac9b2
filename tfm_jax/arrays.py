"""Array types with named axes. Unless a module defines other letters, the axes are:

b: videos in a batch          f: latent frames (pixel frames = 4 (f - 1) + 1)
h, w: latent height, width    c: latent channels (16)
t, y, x: pixel frames, height (8 h), width (8 w)
l: text tokens (512 in Wan)   d: width of the text embedding (4096)
s: tokens of the transformer: f * (h / 2) * (w / 2)
"""

from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[Dtype, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""The dtypes that can be chosen for weights, by name."""

TEXT_LENGTH = 512
"""Number of tokens to which Wan2.1 pads or truncates every prompt, including the end-of-sequence token. A transformer
may take fewer (`TransformerConfig.text_len`)."""

Latents = Float[Array, "b f h w c"]
Video = Float[Array, "b t y x 3"]
Text = Float[Array, "b l d"]
TokenIds = Int[Array, "b l"]
TokenMask = Int[Array, "b l"]
PerVideo = Float[Array, "b"]
PerFrame = Float[Array, "b f"]
Scalar = Float[Array, ""]


def pad_text(embeddings: Sequence[Float[np.ndarray, "_ d"]], length: int) -> Float[np.ndarray, "b l d"]:
    """Stack the text embeddings of prompts, each padded with zeros to `length` tokens, as the transformer expects."""
    first = embeddings[0]
    padded = np.zeros((len(embeddings), length, first.shape[1]), first.dtype)
    for row, embedding in zip(padded, embeddings, strict=True):
        row[: len(embedding)] = embedding
    return padded
