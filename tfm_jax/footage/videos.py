"""Finds the videos of folders, and checks what their headers say before any is measured."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from tfm_jax import video
from tfm_jax.errors import InputError
from tfm_jax.footage.dynamics import frames_needed
from tfm_jax.video_headers import read_header


class Video(NamedTuple):
    """A video file and what its header says."""

    file: Path
    frames: int
    height: int
    width: int
    fps: Fraction

    @property
    def shape(self) -> str:
        return f"{self.frames} frames of {self.height} x {self.width} pixels at {float(self.fps):g} fps"


def find_videos(folder: Path) -> dict[str, Video]:
    """Return the videos of a folder by file name.

    Raises:
        InputError: there is no such folder or no video in it, or a video is damaged or too short.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of videos")
    found = {}
    for file in video.find_clips(folder, video.CONTAINERS):
        header = read_header(file)
        assert header.fps is not None, "only an image has no frame rate"
        found[file.name] = Video(file, header.frames, header.height, header.width, header.fps)
        check_length(found[file.name], header.frames)
    if not found:
        raise InputError(f"{folder}: contains no videos; expected files such as 000.mp4")
    return found


def check_length(video: Video, frames: int) -> None:
    """Raise InputError if the number of frames is too small to measure the video."""
    needed = frames_needed(video.fps)
    if frames < needed:
        plural = "s" * (frames != 1)
        raise InputError(
            f"{video.file}: has {frames} frame{plural}; expected at least {needed}, at {float(video.fps):g} fps"
        )


def check_pairs(folders: Mapping[Path, Mapping[str, Video]]) -> None:
    """Check that videos with the same name in all folders can be compared.

    Raises:
        InputError: a name is missing from a folder, or two videos of the same name differ in length, size or rate.
    """
    (first, videos), *others = folders.items()
    for name, paired in others:
        for file in (*videos, *paired):
            if file not in videos or file not in paired:
                lacking, having = (first, name) if file in paired else (name, first)
                raise InputError(f"{lacking}: contains no {file}, unlike {having}; expected videos of the same names")
            if videos[file].shape != paired[file].shape:
                one, other = videos[file], paired[file]
                raise InputError(f"{other.file}: has {other.shape}; expected {one.shape}, as in {one.file}")
