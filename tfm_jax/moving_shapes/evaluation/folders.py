"""Finds, reads and measures the clips in a folder."""

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
        InputError: the folder or the captions are missing, there are too few clips, the number of captions differs from
            that of clips, or a clip is damaged or too short.
    """
    return measure_clips(find_captioned_clips(folder, prompts, minimum), spec)


def find_captioned_clips(folder: Path, prompts: Path | None, minimum: int) -> list[CaptionedClip]:
    """Return the clips that metadata.csv in the folder lists or, without it, all mp4 files, sorted by number.

    Args:
        prompts: file with one caption per line, in the order of the mp4 files; replaces metadata.csv.
        minimum: the smallest number of clips to accept.

    Raises:
        InputError: the folder or the captions are missing, there are too few clips, or the number of captions differs
            from that of clips.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of mp4 files")
    captions: list[str] | list[None]
    if prompts is None and (folder / METADATA_FILE).exists():
        rows = read_metadata(folder / METADATA_FILE)
        files, captions = [row.path for row in rows], [row.prompt for row in rows]
    else:
        files = video.find_clips(folder)
        captions = read_prompts(prompts) if prompts else [None] * len(files)
    if len(files) < minimum:
        raise InputError(f"{folder}: {len(files)} mp4 files; expected at least {minimum}")
    if len(captions) != len(files):
        raise InputError(f"{prompts}: {len(captions)} captions; expected {len(files)}, one per mp4 file in {folder}")
    return [CaptionedClip(file, caption) for file, caption in zip(files, captions, strict=True)]


def measure_clips(clips: Sequence[CaptionedClip], spec: ClipSpec) -> list[ClipMetrics]:
    """Read and measure clips, one at a time; `spec` gives their number of frames, size and frame rate.

    Raises:
        InputError: a clip is damaged or too short.
    """
    return [
        measure_clip(video.read_clip(clip.path, spec.frames, *spec.size, spec.fps), clip.caption, spec.fps)
        for clip in clips
    ]
