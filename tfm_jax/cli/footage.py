"""Measure flickering, smoothness and amount of motion in any videos, after VBench, without a download.

    tfm-evaluate --vbench samples/base samples/lora
    tfm-evaluate --vbench samples/lora --reference=my_clips --dino=weights/dino-vitb16

The table shows the mean of every metric over the videos of each folder, with a 95% bootstrap interval. Several folders
must contain videos of the same names, lengths and sizes, such as samples of the base model and of a LoRA for the same
prompts. For two folders, the table also shows the mean difference between videos of the same name.

VBench uses networks to measure smoothness and motion. Here optical flow takes their place, and the names of the metrics
say so: do not compare these values with VBench's. docs/evaluation.md explains every metric, and how to run VBench
itself on the same videos.
"""

from collections.abc import Collection, Sequence
from typing import Annotated

from pydantic import Field
from tyro.conf import Positional

from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, section
from tfm_jax.errors import InputError
from tfm_jax.files import check_parent
from tfm_jax.footage.consistency import RECIPES, Embed, Kind, load
from tfm_jax.footage.measuring import measure_videos
from tfm_jax.footage.report import DIFFERENCE, REFERENCE, format_table, subtract, summarize, to_json
from tfm_jax.footage.videos import check_pairs, find_videos

FLAG = "--vbench"
"""Selects this program in place of the evaluation of moving shapes."""


@section
class Options:
    videos: Positional[Annotated[tuple[NonEmptyPath, ...], Field(min_length=1)]]
    """Folders of videos, such as those that tfm-sample writes."""
    reference: NonEmptyPath | None = None
    """Folder of real videos, for comparison. Their names and sizes may be others."""
    dino: NonEmptyPath | None = None
    """Folder of the network DINO ViT-B/16 in the format of transformers, for subject consistency; needs PyTorch."""
    clip: NonEmptyPath | None = None
    """Folder of the network CLIP ViT-B/32 in the format of transformers, for background consistency; needs PyTorch."""
    json: NonEmptyPath | None = None
    """JSON file to write the values of every video to, with the means and intervals."""


def execute(argv: Sequence[str]) -> None:
    rest = list(argv)
    rest.remove(FLAG)
    options = command.parse(Options, rest, f"tfm-evaluate {FLAG}", __doc__).options()
    check_names([folder.name for folder in options.videos], (REFERENCE, DIFFERENCE))
    if options.json:
        check_parent("--json", options.json)
    found = {folder: find_videos(folder) for folder in options.videos}
    check_pairs(found)
    columns = {folder.name: videos for folder, videos in found.items()}
    if options.reference:
        columns[REFERENCE] = find_videos(options.reference)
    networks: dict[Kind, Embed] = {kind: load(kind, path) for kind in RECIPES if (path := getattr(options, kind))}

    measured = {name: measure_videos(videos, networks, name) for name, videos in columns.items()}
    if len(found) == 2:
        measured[DIFFERENCE] = subtract(*(measured[folder.name] for folder in found))
    summaries = {name: summarize(videos) for name, videos in measured.items()}
    print(format_table(summaries))
    if options.json:
        options.json.write_text(to_json(measured, summaries), encoding="utf-8")


def check_names(names: Sequence[str], columns: Collection[str]) -> None:
    """Check that the names of folders can be the titles of columns, beside the given ones.

    Raises:
        InputError: a name occurs twice, or is the title of another column.
    """
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: {names.count(name)} folders have this name; expected different names")
        if name in columns:
            raise InputError(f"{name}: a folder has the name of a column of the report; expected another name")
