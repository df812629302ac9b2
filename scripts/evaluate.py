"""Measure how the objects of clips move, against real clips of the same world.

    python scripts/evaluate.py runs/demo/samples/base runs/demo/samples/lora \\
        --reference=runs/demo/reference --prompts=runs/demo/prompts.txt

Each folder holds mp4 files, and may hold a metadata.csv with their captions. Printed for each metric: every folder of
generated clips, the reference, and the floor, which is what two random halves of the reference differ by; a difference
that is not well above it shows nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from tfm_jax import cli
from tfm_jax.embedded.world import Stage
from tfm_jax.errors import InputError
from tfm_jax.evaluation.report import Counts, compare, measure_folder, show, to_json


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("generated", type=Path, nargs="+", help="folders of mp4 files, such as sample.py writes")
    parser.add_argument("--reference", type=Path, required=True, help="folder of real clips")
    parser.add_argument("--prompts", type=Path, help="captions of each folder's clips, one a line, in their order")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--frames", type=int, default=17, help="frames read of each clip (default: 17)")
    parser.add_argument("--height", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--width", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--fps", type=float, default=16.0, help="frames a second (default: 16)")
    options = parser.parse_args(argv)
    for name, least in (("frames", 5), ("height", 16), ("width", 16), ("fps", 1)):
        if not getattr(options, name) >= least:
            raise InputError(f"--{name}={getattr(options, name)}: expected at least {least}")
    stage = Stage(options.frames, (options.height, options.width), options.fps)
    names = [folder.name for folder in options.generated]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: the name of {names.count(name)} folders; expected each to have its own")
    generated = [measure_folder(folder, options.prompts, stage, least=2) for folder in options.generated]
    reference = measure_folder(options.reference, None, stage, least=4)
    tables, sizes = {}, {}
    for folder, clips in zip(options.generated, generated, strict=True):
        tables[folder.name], compared = compare(clips, reference)
        sizes[folder.name] = Counts(len(clips), len(reference), compared)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} has {counts.generated}" for name, counts in sizes.items())
        raise InputError(f"{found} clips; expected as many in each folder")
    counts = sizes[options.generated[0].name]
    print(show(tables, counts))
    if options.json:
        options.json.write_text(to_json(tables, counts), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
