"""Measures videos."""

from collections.abc import Mapping

from tqdm import tqdm

from tfm_jax import video
from tfm_jax.errors import InputError
from tfm_jax.footage.consistency import Consistency, Embed, Kind
from tfm_jax.footage.dynamics import Dynamics
from tfm_jax.footage.flickering import Flickering
from tfm_jax.footage.flow import SMALLEST_SIDE
from tfm_jax.footage.metric import Metric
from tfm_jax.footage.smoothness import Smoothness
from tfm_jax.footage.videos import Video, check_length

Values = dict[str, float]
"""Metric -> value for one video."""

TITLES = {
    "temporal_flickering": "temporal flickering",
    "smoothness_optical_flow": "smoothness (optical flow)",
    "dynamic_degree_optical_flow": "dynamic degree (optical flow)",
    "speed_optical_flow": "speed, pixels per frame (optical flow)",
    "subject_consistency": "subject consistency (DINO)",
    "background_consistency": "background consistency (CLIP)",
}


def measure_videos(videos: Mapping[str, Video], networks: Mapping[Kind, Embed], task: str) -> dict[str, Values]:
    """Measure videos one after the other, and show the progress.

    Raises:
        InputError: see `measure_video`.
    """
    with tqdm(videos.items(), desc=task, unit="video") as bar:  # closed before an error is printed on the next line
        return {name: measure_video(each, networks) for name, each in bar}


def measure_video(measured: Video, networks: Mapping[Kind, Embed]) -> Values:
    """Measure one video, which is decoded once, frame by frame.

    Raises:
        InputError: the video is damaged, too short or too small, or its frames have several sizes.
    """
    metrics: list[Metric] = [Flickering(), Smoothness(), Dynamics(measured.fps)]
    metrics += [Consistency(kind, embed) for kind, embed in networks.items()]
    frames, size = 0, None
    for frame in video.read_frames(measured.file):
        size = size or frame.shape
        _check_size(measured, frames, frame.shape, size)
        for metric in metrics:
            metric.add(frame)
        frames += 1
    check_length(measured, frames)
    return {name: value for metric in metrics for name, value in metric.values().items()}


def _check_size(measured: Video, number: int, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    height, width, _ = found
    text = f"{measured.file}: frame {number} has {height} x {width} pixels"
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(f"{text}; expected at least {SMALLEST_SIDE} x {SMALLEST_SIDE}")
    if found != expected:
        raise InputError(f"{text}; expected {expected[0]} x {expected[1]}, like the first frame")
