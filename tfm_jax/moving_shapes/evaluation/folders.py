"""Finds, reads and measures the clips of a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tfm_jax import video
from tfm_jax.data.metadata import METADATA_FILE, read_metadata
from tfm_jax.errors import InputError
from tfm_jax.moving_shapes.evaluation.clip_metrics import ClipMetrics, measure_clip
from tfm_jax.moving_shapes.scene import ClipSpec
from tfm_jax.prompts import read_prompts


class CaptionedClip(NamedTuple):
    """A video file and its caption."""

    path: Path
    caption: str | None


def measure_folder(folder: Path, prompts: Path | None, spec: ClipSpec, minimum: int) -> list[ClipMetrics]:
    """Measure the clips that `find_captioned_clips` finds.

    Raises:
        InputError: the folder, a clip or the captions are missing, damaged or too few.
    """
    return measure_clips(find_captioned_clips(folder, prompts, minimum), spec)


def find_captioned_clips(folder: Path, prompts: Path | None, minimum: int) -> list[CaptionedClip]:
    """Return the clips of a folder: those in its metadata.csv, or else every mp4 file, sorted by number.

    Args:
        prompts: file with one caption per line, in the order of the mp4 files; replaces a metadata.csv.
        minimum: the least number of clips.

    Raises:
        InputError: the folder or the captions are missing or too few.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of mp4 files")
    captions: list[str] | list[None]
    if prompts is None and (folder / METADATA_FILE).exists():
        rows = read_metadata(folder)
        files, captions = [row.path for row in rows], [row.prompt for row in rows]
    else:
        files = video.find_clips(folder)
        captions = read_prompts(prompts) if prompts else [None] * len(files)
    if len(files) < minimum:
        raise InputError(f"{folder}: {len(files)} mp4 files; expected at least {minimum}")
    if len(captions) != len(files):
        raise InputError(f"{prompts}: {len(captions)} captions; expected {len(files)}, one for each mp4 of {folder}")
    return [CaptionedClip(file, caption) for file, caption in zip(files, captions, strict=True)]


def measure_clips(clips: Sequence[CaptionedClip], spec: ClipSpec) -> list[ClipMetrics]:
    """Read clips with the frames, size and rate of `spec`, and measure them, one at a time.

    Raises:
        InputError: a clip is damaged or too short.
    """
    return [
        measure_clip(video.read_clip(clip.path, spec.frames, *spec.size, spec.fps), clip.caption, spec.fps)
        for clip in clips
    ]
