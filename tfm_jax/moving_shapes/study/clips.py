"""Makes the clips, latents and prompts of a study. All of them follow from seeds, so that they can be made again."""

import json
from pathlib import Path
from typing import NamedTuple

from tfm_jax import config as configs
from tfm_jax.data.metadata import read_metadata
from tfm_jax.data.prepare import PrepareRun, prepare
from tfm_jax.data.records import Records, open_records
from tfm_jax.errors import InputError
from tfm_jax.files import replacing
from tfm_jax.moving_shapes.evaluation.folders import measure_folder
from tfm_jax.moving_shapes.evaluation.set_metrics import ClipSet
from tfm_jax.moving_shapes.study.plan import Study, pilot_settings
from tfm_jax.moving_shapes.study.results import find_difference
from tfm_jax.moving_shapes.world import has_clips, write_clips
from tfm_jax.prompts import write_prompts

CLIP_SEEDS = {"clips": 1000, "held_out": 1001, "reference": 1002}
"""Folder of real clips -> seed. The three folders are for training, for the prompts and for comparison."""


class World(NamedTuple):
    """The real clips of one law."""

    latents: Path
    """Folder with the latents of the training clips."""
    held_out: Records
    numbers: tuple[int, ...]
    """For each prompt, the index of its held-out record."""
    prompts: Path
    """Text file with one prompt per line: distinct captions of held-out clips, none of which a training clip has."""
    reference: ClipSet


def make_world(study: Study, law: str) -> World:
    """Make the clips and latents of a law, unless they exist, and choose the prompts.

    Raises:
        InputError: the output folder belongs to another study, or there are too few distinct captions.
    """
    _check_folder(study)
    folder, size = study.output / law, study.size
    # Twice as many held-out clips as prompts, because some of them have the same caption.
    _make_clips(study, law, "held_out", 2 * size.prompts)
    captions = [clip.prompt for clip in read_metadata(folder / "held_out")]
    prompts = list(dict.fromkeys(captions))[: size.prompts]
    if len(prompts) < size.prompts:
        raise InputError(f"--prompts={size.prompts}: expected at most {len(prompts)}, the number of captions of {law}")
    _make_clips(study, law, "clips", size.clips, without=prompts)
    _make_clips(study, law, "reference", size.reference)
    write_prompts(folder / "prompts.txt", prompts)
    latents, held_out = (_make_latents(study, folder / name) for name in ("clips", "held_out"))
    reference = measure_folder(folder / "reference", None, study.spec, minimum=4)
    numbers = tuple(map(captions.index, prompts))
    return World(latents, open_records(held_out), numbers, folder / "prompts.txt", reference)


def _check_folder(study: Study) -> None:
    """Raise InputError if the clips in the output folder were made with other settings."""
    file, now = study.output / "settings.json", pilot_settings(study)
    if not file.exists():
        with replacing(file) as scratch:
            scratch.write_text(json.dumps(now), encoding="utf-8")
    elif difference := find_difference(json.loads(file.read_text(encoding="utf-8")), now):
        raise InputError(f"{file}: belongs to a study with {difference}; choose another --output")


def _make_clips(study: Study, law: str, name: str, count: int, without: list[str] | None = None) -> None:
    folder = study.output / law / name
    if not has_clips(folder):
        print(f"making {count} clips in {folder}", flush=True)
        seed = CLIP_SEEDS[name]
        write_clips(folder, count, *study.spec, seed=seed, laws=[law], num_objects=(1,), without=without or ())


def _make_latents(study: Study, source: Path) -> Path:
    """Make the latents of a folder of clips, unless they exist, and return their folder."""
    data = configs.DataConfig(source=source, path=source.with_name(f"{source.name}_latents"), max_rejected=0)
    if not data.path.exists():
        prepare(PrepareRun(model=study.run.model, clip=study.run.clip, data=data))
    return data.path
