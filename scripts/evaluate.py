"""Measure how the objects of clips move, against real clips of the same world.

    python scripts/evaluate.py runs/demo/samples/base runs/demo/samples/lora \\
        --reference=runs/demo/reference --prompts=runs/demo/prompts.txt

Each folder holds mp4 files, and may hold a metadata.csv with their captions. Printed for each metric: every folder of
generated clips, the reference, and the floor, which is the difference between two random halves of the reference. A
difference that is not well above the floor shows nothing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tfm_jax import cli
from tfm_jax import config as configs
from tfm_jax.errors import InputError
from tfm_jax.moving_shapes.evaluation.folders import find_captioned_clips, measure_clips
from tfm_jax.moving_shapes.evaluation.report import ClipCounts, format_table, to_json
from tfm_jax.moving_shapes.evaluation.set_metrics import compare
from tfm_jax.moving_shapes.scene import ClipSpec

DEFAULT = configs.ClipConfig(frames=17, height=64, width=64, fps=16)
LIMITS = {"frames": (5, 1000), "height": (16, 4096), "width": (16, 4096), "fps": (1, 1000)}
LARGEST_CLIP = 100_000_000
"""Frames x height x width: 81 frames at 720p are 75 million. Tracking takes some 100 bytes a pixel."""


@configs.section
class ClipSection:
    """What is read of a configuration."""

    clip: configs.ClipConfig


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    spec = read_spec(options)
    names = [folder.name for folder in options.generated]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: the name of {names.count(name)} folders; expected each to have its own")
    listed = [find_captioned_clips(folder, options.prompts, minimum=2) for folder in options.generated]
    reference = find_captioned_clips(options.reference, None, minimum=4)
    sizes = [len(clips) for clips in listed]
    if len(set(sizes)) > 1:
        found = ", ".join(f"{name} has {size}" for name, size in zip(names, sizes, strict=True))
        raise InputError(f"{found} clips; expected as many in each folder")
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise InputError(f"--json={options.json}: cannot be written; expected a file in a folder that exists")

    generated = [measure_clips(clips, spec) for clips in listed]
    real = measure_clips(reference, spec)
    compared = [compare(clips, real) for clips in generated]
    tables = {name: table for name, (table, _) in zip(names, compared, strict=True)}
    counts = ClipCounts(sizes[0], len(real), compared[0][1])
    print(format_table(tables, counts))
    if options.json:
        options.json.write_text(to_json(tables, counts), encoding="utf-8")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("generated", type=Path, nargs="+", help="folders of mp4 files, such as sample.py writes")
    parser.add_argument("--reference", type=Path, required=True, help="folder of real clips")
    parser.add_argument("--prompts", type=Path, help="captions of each folder's clips, one per line, in their order")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--config", type=Path, help="YAML file whose clip section replaces the defaults below")
    parser.add_argument("--frames", type=int, help=f"frames read of each clip (default: {DEFAULT.frames})")
    parser.add_argument("--height", type=int, help=f"pixels (default: {DEFAULT.height})")
    parser.add_argument("--width", type=int, help=f"pixels (default: {DEFAULT.width})")
    parser.add_argument("--fps", type=float, help=f"frames a second (default: {DEFAULT.fps:g})")
    return parser.parse_args(argv)


def read_spec(options: argparse.Namespace) -> ClipSpec:
    """Frames, size and rate: from the options, else from the configuration, else the defaults.

    Raises:
        InputError: one of them is out of its limits, or a clip would be too large.
    """
    clip = DEFAULT
    if options.config is not None:
        clip = configs.parse(ClipSection, ["--config", str(options.config)], "evaluate.py", "").clip
    values = {}
    for name, (least, most) in LIMITS.items():
        given = getattr(options, name)
        values[name] = getattr(clip, name) if given is None else given
        if not least <= values[name] <= most:
            field = f"{options.config}: clip.{name}" if given is None else f"--{name}"
            raise InputError(f"{field}={values[name]}: expected {least} to {most}")
    frames, height, width, fps = values.values()
    if frames * height * width > LARGEST_CLIP:
        size = f"{frames} frames of {height} x {width}"
        raise InputError(f"{size}: {frames * height * width:,} pixels a clip; expected at most {LARGEST_CLIP:,}")
    return ClipSpec(frames, (height, width), fps)


if __name__ == "__main__":
    cli.run(main)
