"""Reads the clips that the demo shows, and measures how their objects move."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tfm_jax import video
from tfm_jax.moving_shapes.captions import read_caption
from tfm_jax.moving_shapes.evaluation.clip_metrics import match_tracks, measure_clip
from tfm_jax.moving_shapes.evaluation.tracking import Pixels, track
from tfm_jax.moving_shapes.scene import ClipSpec


class ShownClip(NamedTuple):
    """A clip with the motion that was measured in it."""

    pixels: Pixels
    paths: Float[np.ndarray, "n t 2"]
    """Centres (x, y) in pixels of the objects that were found; NaN in frames that do not show the object."""
    residual: float
    """In pixels; infinite if an object is lost."""


class Example(NamedTuple):
    """A prompt and its clips."""

    caption: str
    clips: dict[str, ShownClip]
    """Source, such as "base", -> clip."""


def read_examples(folders: Mapping[str, Path], captions: Sequence[str], spec: ClipSpec) -> list[Example]:
    """Return one example per caption; each folder contains the clips of one source, in the order of the captions."""
    files = {source: video.find_clips(folder) for source, folder in folders.items()}
    examples = []
    for number, caption in enumerate(captions):
        clips = {
            source: video.read_clip(found[number], spec.frames, *spec.size, spec.fps) for source, found in files.items()
        }
        shown = {source: measure(pixels, caption, spec.fps) for source, pixels in clips.items()}
        examples.append(Example(caption, shown))
    return examples


def measure(pixels: Pixels, caption: str, fps: float | int) -> ShownClip:
    """Track the objects of the caption in a clip."""
    _, objects = read_caption(caption) or ("", ())
    tracks = match_tracks(track(pixels), objects)
    paths = np.array([found.centres for found in tracks]).reshape(-1, len(pixels), 2)
    return ShownClip(pixels, paths, measure_clip(pixels, caption, fps).residual)
