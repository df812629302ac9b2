"""Measure how objects move in generated clips, compared with real clips of the same world.

    tfm-evaluate runs/demo/videos/base runs/demo/videos/lora \\
        --reference=runs/demo/reference --prompts=runs/demo/prompts.txt

Each folder contains mp4 files, and optionally metadata.csv with their prompts. For each metric, the table shows a value
for every folder of generated clips, one for the reference, and the floor: the difference between two random halves of
the reference. Differences that are not well above the floor are meaningless. A second table shows 95% intervals
over the clips and, for two folders whose clips have the same prompts, of the difference. If all clips have the same
value, its interval has no width.

These metrics are for the world of moving shapes only. Others, with options of their own, are for any videos:

    tfm-evaluate --vbench samples/base samples/lora
    tfm-evaluate --vbench --help
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from tyro.conf import Positional

from tfm_jax import config
from tfm_jax.cli import command, footage
from tfm_jax.config import ClipConfig, NonEmptyPath, section
from tfm_jax.errors import InputError
from tfm_jax.files import check_parent
from tfm_jax.moving_shapes.evaluation.folders import CaptionedClip, find_captioned_clips, measure_clips
from tfm_jax.moving_shapes.evaluation.intervals import DIFFERENCE, measure_intervals
from tfm_jax.moving_shapes.evaluation.report import (
    OTHER_COLUMNS,
    ClipCounts,
    format_intervals,
    format_table,
    to_json,
)
from tfm_jax.moving_shapes.evaluation.set_metrics import compare
from tfm_jax.moving_shapes.scene import ClipSpec

DEFAULT = ClipConfig(frames=17, height=64, width=64, fps=16)
LIMITS = {"frames": (5, 1000), "height": (16, 4096), "width": (16, 4096), "fps": (1, 1000)}
LARGEST_CLIP = 100_000_000
"""Maximum of frames x height x width; 81 frames at 720p are 75 million. Tracking takes about 100 bytes per pixel."""


@section
class Options:
    generated: Positional[Annotated[tuple[NonEmptyPath, ...], Field(min_length=1)]]
    """Folders of mp4 files, such as those that tfm-sample writes."""
    reference: NonEmptyPath
    """Folder of real clips."""
    prompts: NonEmptyPath | None = None
    """Text file with the prompts of the clips, one per line in the order of the clips; the same for every folder."""
    json: NonEmptyPath | None = None
    """JSON file to write the numbers to."""
    config: Path | None = None
    """YAML file, or the name of a shipped configuration; its clip section gives defaults for the next four options."""
    frames: int | None = None
    """Number of frames to read from each clip; 17 without a configuration."""
    height: int | None = None
    """Height in pixels; 64 without a configuration."""
    width: int | None = None
    """Width in pixels; 64 without a configuration."""
    fps: float | None = None
    """Frames per second; 16 without a configuration."""


@section
class ClipSection:
    """The section that an evaluation reads from a configuration."""

    clip: ClipConfig


def execute(argv: Sequence[str]) -> None:
    if footage.FLAG in argv:
        footage.execute(argv)
        return
    options = command.parse(Options, argv, "tfm-evaluate", __doc__).options()
    spec = read_spec(options)
    names = [folder.name for folder in options.generated]
    footage.check_names(names, (*OTHER_COLUMNS, DIFFERENCE))
    listed = [find_captioned_clips(folder, options.prompts, minimum=2) for folder in options.generated]
    reference = find_captioned_clips(options.reference, None, minimum=4)
    sizes = [len(clips) for clips in listed]
    if len(set(sizes)) > 1:
        found = ", ".join(f"{name} has {size}" for name, size in zip(names, sizes, strict=True))
        raise InputError(f"{found} clips; expected the same number in each folder")
    if options.json:
        check_parent("--json", options.json)

    generated = [measure_clips(clips, spec) for clips in listed]
    real = measure_clips(reference, spec)
    compared = [compare(clips, real) for clips in generated]
    tables = {name: table for name, (table, _) in zip(names, compared, strict=True)}
    counts = ClipCounts(sizes[0], len(real), compared[0][1])
    intervals = measure_intervals(dict(zip(names, generated, strict=True)), _have_same_prompts(listed))
    print(format_table(tables, counts), format_intervals(tables, intervals), sep="\n\n")
    if options.json:
        options.json.write_text(to_json(tables, counts, intervals), encoding="utf-8")


def _have_same_prompts(folders: Sequence[Sequence[CaptionedClip]]) -> bool:
    """Whether there are two folders, and clips at the same position have the same known prompt."""
    if len(folders) != 2:
        return False
    return all(one.caption == other.caption is not None for one, other in zip(*folders, strict=True))


def read_spec(options: Options) -> ClipSpec:
    """Return the number of frames, the size and the frame rate of the clips.

    Options take precedence over the configuration, and the configuration over the defaults.

    Raises:
        InputError: a value is outside its limits, or the clips are too large.
    """
    clip = config.load(ClipSection, options.config).clip if options.config else DEFAULT
    values = {}
    for name, (least, most) in LIMITS.items():
        given = getattr(options, name)
        values[name] = getattr(clip, "rate" if name == "fps" else name) if given is None else given
        if not least <= values[name] <= most:
            field = f"{options.config}: clip.{name}" if given is None else f"--{name}"
            raise InputError(f"{field}={values[name]}: expected {least} to {most}")
    frames, height, width, fps = values.values()
    if frames * height * width > LARGEST_CLIP:
        size = f"{frames} frames of {height} x {width}"
        raise InputError(f"{size}: {frames * height * width:,} pixels per clip; expected at most {LARGEST_CLIP:,}")
    return ClipSpec(frames, (height, width), fps)


def main() -> None:
    command.run(execute)
