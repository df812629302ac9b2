"""Compare a LoRA with the base model: videos from the same noise, side by side in one file."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tfm_jax import files, processes, video
from tfm_jax.errors import InputError
from tfm_jax.sampling.outputs import SampleRun, Samples
from tfm_jax.sampling.pipeline import read_lora, sample

SIDES = ("base", "lora")
STRIP = 24
"""Height of the strip with the labels, in pixels."""


def compare(run: SampleRun) -> None:
    """Sample into base/ and lora/ in run.sampling.output, and write 000.mp4, ... with both videos there.

    What is there already is kept, so that the same command continues an interrupted run. In a run of several processes,
    all of them call this; the first one writes the files with both videos.

    Raises:
        InputError: there is no LoRA, the folder contains other files, or `sample` refuses the inputs.
        StoppedEarly: see `sample`.
    """
    settings = run.sampling
    if not settings.loras:
        raise InputError("sampling.lora=null: --compare needs a LoRA; expected a file")
    _check_folder(settings.output)
    read_lora(run)  # to refuse a bad file now, and not after the base model's videos
    sides = []
    for name, lora in zip(SIDES, (None, settings.lora), strict=True):
        sampling = dataclasses.replace(settings, lora=lora, output=settings.output / name)
        sides.append(sample(dataclasses.replace(run, sampling=sampling)))
    if not processes.is_first():
        return
    labels = ("base", ", ".join(file.name for file in settings.loras))
    for number in range(sides[0].count):
        target = settings.output / sides[0].video(number).name
        if not target.exists():
            _write_pair(target, sides, labels, number)
    print(f"{settings.output}: {sides[0].count} videos, base and LoRA side by side")


def _check_folder(folder: Path) -> None:
    files.check_output_directory("sampling.output", folder)
    for path in folder.iterdir() if folder.exists() else ():
        if path.name not in SIDES and path.suffix not in (".mp4", ".partial"):
            other = f"contains {path.name}, which --compare does not write"
            raise InputError(f"sampling.output={folder}: {other}; expected a new or empty directory")


def _write_pair(target: Path, sides: list[Samples], labels: tuple[str, str], number: int) -> None:
    """Write the videos of both sides next to each other, below their labels."""
    clip = sides[0].run.clip
    clips = [video.read_clip(side.video(number), clip.frames, clip.height, clip.width, clip.rate) for side in sides]
    strip = np.concatenate([_label(label, clip.width) for label in labels], axis=1)
    frames = (np.concatenate([strip, np.concatenate(pair, axis=1)]) for pair in zip(*clips, strict=True))
    video.write_clip(target, frames, clip.rate, sides[1].about(number))


def _label(text: str, width: int) -> np.ndarray:
    image = Image.new("RGB", (width, STRIP), "white")
    ImageDraw.Draw(image).text((4, STRIP / 2), text, "black", ImageFont.load_default(14), anchor="lm")
    return np.asarray(image)
