"""Encode clips and prompts once, into latents and text embeddings on disk, so that training never runs the encoders.

Any number of processes share the work, block by block; see `tfm_jax.data.blocks`.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import jax
from tqdm import tqdm

from tfm_jax import config as configs
from tfm_jax import console, processes
from tfm_jax.arrays import DTYPES
from tfm_jax.config import section
from tfm_jax.data import format as files
from tfm_jax.data.blocks import Block, Plan, Unfinished, count_rows_per_block, hash_list
from tfm_jax.data.buckets import Bucket
from tfm_jax.data.clips import Rejected, Windows, describe_rate
from tfm_jax.data.decoding import Pixels, read_clips
from tfm_jax.data.encoding import Encoders, Unencoded, encode, find_encoders
from tfm_jax.data.format import Line, Manifest, Record
from tfm_jax.data.metadata import Clip, Metadata, find_metadata, read_metadata
from tfm_jax.data.survey import (
    Surveyed,
    check_length,
    check_rejected,
    count_reasons,
    rejection,
    survey,
    used_buckets,
    without_path,
)
from tfm_jax.errors import InputError


@section
class PrepareRun:
    """The sections of the configuration that data preparation reads."""

    model: configs.ModelConfig
    clip: configs.ClipConfig
    data: configs.DataConfig


class Prepared(NamedTuple):
    """How many clips were written, and how many of the listed videos were rejected."""

    written: int
    rejected: int


def prepare(run: PrepareRun) -> Prepared | None:
    """Encode the clips that `run.data.source` lists and write `run.data.path`.

    The work is done in the folder `run.data.path.partial`. If the run is stopped, the same call continues it. A video
    that cannot be used, such as one that is too short or damaged, is listed with the reason in rejected.jsonl. In a
    distributed run, every process must call this.

    Returns:
        The result in the first process, None in the others.

    Raises:
        InputError: `run.data.source` is missing, the list of clips or the model is not as expected, the output folder
            is not empty, the unfinished folder belongs to other settings, too many videos cannot be used, or one is
            too short and `run.clip.short` says to refuse it.
    """
    listed, rows = read_list(run)
    place, first = Unfinished(run.data.path), processes.is_first()
    with place.locked() if first else nullcontext():
        # The folder may be removed until all processes are ready; then others may write to it.
        with place.removed_if_empty() if first else nullcontext():
            plan = _agree_on_plan(run, rows, place)
            missing = _survey_missing(run, plan, rows, place)
            _announce(run, listed, plan, missing)
            encoders = _load_encoders(run, place) if missing.blocks else None
            processes.meet("every process is ready")
        with nullcontext() if processes.is_distributed() else place.removed_if_empty():
            if encoders:
                _make_blocks(run, plan, missing, encoders, place)
            processes.meet("all blocks are finished")
            return _finish(run, plan, place) if first else None


def read_list(run: PrepareRun) -> tuple[Metadata, list[Clip]]:
    """Find and read the list of clips.

    Raises:
        InputError: `run.data.source` is missing, or the list is not as expected.
    """
    if run.data.source is None:
        raise InputError("data.source is missing; expected a list of clips, or a folder that contains metadata.csv")
    listed = find_metadata(run.data.source)
    return listed, read_metadata(listed, run.data.absolute_paths)


def _agree_on_plan(run: PrepareRun, rows: Sequence[Clip], place: Unfinished) -> Plan:
    """Write the plan in the first process, or check that it is the old one; check in the others that it is the same."""
    found = find_encoders(run.model.path)
    values = configs.plain(run)
    manifest = Manifest(
        encoders=found.fingerprints,
        dtype=run.data.dtype,
        clip=values["clip"],
        data_seed=run.data.seed,
        model=values["model"]["path"],
        clips=hash_list(rows),
    )
    per_block = count_rows_per_block(run.clip, run.data.dtype, found.channels, found.text_dim)
    plan = Plan(manifest=manifest, model_dtype=run.model.dtype, rows=len(rows), rows_per_block=per_block)
    if processes.is_first():
        place.begin(plan)
    processes.meet("the plan is written")
    place.check(plan)
    return plan


class _Missing(NamedTuple):
    """The work that is left."""

    blocks: dict[int, list[Surveyed]]
    """The videos of each block that is not finished, by the number of the block."""
    rejected: dict[int, list[Line]]
    """The rejected videos of each block, as far as they are known: from the finished blocks and from the headers."""


def _survey_missing(run: PrepareRun, plan: Plan, rows: Sequence[Clip], place: Unfinished) -> _Missing:
    """Read the headers of the videos in the missing blocks.

    Raises:
        InputError: too many videos cannot be used, or one is too short and may not be.
    """
    if place.is_complete:
        return _Missing({}, {})
    rejected = {number: block.rejected for number, block in place.read_blocks().items()}
    numbers = [number for number in range(plan.blocks) if number not in rejected]
    surveyed = survey([rows[row] for number in numbers for row in plan.rows_of(number)], run.clip, run.data.seed)
    check_length(surveyed, run.clip)
    left = iter(surveyed)
    missing = {number: list(itertools.islice(left, len(plan.rows_of(number)))) for number in numbers}
    for number, entries in missing.items():
        rejected[number] = [rejection(row, chosen.reason) for row, _, chosen in entries if isinstance(chosen, Rejected)]
    _check_rejected(rejected, plan, run)
    return _Missing(missing, rejected)


def _check_rejected(rejected: dict[int, list[Line]], plan: Plan, run: PrepareRun) -> None:
    check_rejected([line for _, lines in sorted(rejected.items()) for line in lines], plan.rows, run.data)


def _announce(run: PrepareRun, listed: Metadata, plan: Plan, missing: _Missing) -> None:
    if not processes.is_first():
        return
    buckets = list(used_buckets([entry for entries in missing.blocks.values() for entry in entries]))
    size = f"{len(buckets)} sizes"
    if len(buckets) == 1:
        size = f"{buckets[0].frames} frames of {buckets[0].height} x {buckets[0].width} pixels"
    where = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}{where}"
    clips = f"{listed.path} ({listed.format}): {plan.rows} clip{'s' if plan.rows > 1 else ''}"
    console.log(f"{clips}, {size} at {describe_rate(run.clip)}; model {run.model.path}; {devices}")
    if done := plan.blocks - len(missing.blocks):
        console.log(f"continuing {run.data.path}: {done} of {plan.blocks} blocks are finished")


def _load_encoders(run: PrepareRun, place: Unfinished) -> Encoders:
    """Load the encoders. The first process also writes the embedding of the empty prompt."""
    if processes.is_first():
        console.log("loading the text encoder and the autoencoder")
    encoders = Encoders(run.model)
    if processes.is_first():
        files.write_empty_prompt(place.folder, encoders.text("").astype(DTYPES[run.data.dtype]))
    return encoders


def _make_blocks(run: PrepareRun, plan: Plan, missing: _Missing, encoders: Encoders, place: Unfinished) -> None:
    """Make the missing blocks that are the share of this process.

    Raises:
        InputError: too many videos cannot be used.
    """
    own = list(missing.blocks)[jax.process_index() :: jax.process_count()]
    counts = {number: sum(map(_count, entries)) for number, entries in missing.blocks.items()}
    progress = _Progress(sum(counts.values()), sum(counts[number] for number in own))
    for number in own:
        block = _make_block(run, missing.blocks[number], encoders, place.folder / plan.shard_name(number), progress)
        place.write_block(number, block)
        missing.rejected[number] = block.rejected
        _check_rejected(missing.rejected, plan, run)
    progress.close()


def _make_block(
    run: PrepareRun, surveyed: Sequence[Surveyed], encoders: Encoders, shard: Path, progress: "_Progress"
) -> Block:
    """Encode the videos of a block into a shard. The clips of a size follow each other, in the order of the list."""
    reasons = {row: chosen.reason for row, _, chosen in surveyed if isinstance(chosen, Rejected)}
    usable = [entry for entry in surveyed if isinstance(entry.chosen, Windows)]
    repeating: list[str] = []

    def clips(decoded: Iterator[tuple[Surveyed, Pixels | InputError]]) -> Iterator[Unencoded]:
        for (row, _, _), found in decoded:
            if isinstance(found, InputError):
                reasons[row] = without_path(found, row)
                continue
            if (found.pixels[1:] == found.pixels[:-1]).all(axis=(1, 2, 3)).any():
                repeating.append(found.video)
            yield Unencoded(found.video, row.prompt, found.pixels)

    with contextlib.closing(read_clips(sorted(usable, key=_bucket), run.clip)) as decoded:
        records = encode(clips(decoded), encoders, run.data.dtype)
        written, entries = files.write_shard(shard, progress.follow(records))
    rejected = [rejection(row, reasons[row]) for row, _, _ in surveyed if row in reasons]
    for line in rejected:
        tqdm.write(f"rejected: {line['video']}: {line['reason']}", file=sys.stderr)
    return Block(shard=written, entries=entries, rejected=rejected, repeating=repeating)


def _bucket(entry: Surveyed) -> Bucket:
    assert isinstance(entry.chosen, Windows)
    return entry.chosen.bucket


def _count(entry: Surveyed) -> int:
    """Return the number of clips that a video gives, by its header."""
    return len(entry.chosen.starts) if isinstance(entry.chosen, Windows) else 0


class _Progress:
    """The progress bar of the first process, over the clips of all processes, whose speed is taken to be the same.

    Args:
        total: number of clips that all processes encode.
        own: number of those that this process encodes.
    """

    def __init__(self, total: int, own: int):
        self._total, self._own, self._done = total, own, 0
        self._bar: tqdm | None = None

    def follow(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records, and advance the bar with each."""
        for record in records:
            yield record
            self._done += 1
            estimate = round(self._done * self._total / self._own)
            if self._bar is None:  # only now, because the first clip includes the compilation
                hidden = not processes.is_first()
                self._bar = tqdm(desc="preparing", unit="clip", total=self._total, initial=estimate, disable=hidden)
            self._bar.update(estimate - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _finish(run: PrepareRun, plan: Plan, place: Unfinished) -> Prepared:
    """Write what describes the whole, and move the folder to its place.

    Raises:
        InputError: too many videos cannot be used.
    """
    if not place.is_complete:
        done = place.read_blocks()
        rejected = {number: block.rejected for number, block in done.items()}
        _check_rejected(rejected, plan, run)
        if not any(block.entries for block in done.values()):
            reasons = count_reasons([line for lines in rejected.values() for line in lines])
            raise InputError(f"{run.data.source}: none of the {plan.rows} videos can be used: {reasons}")
        _report_repeating(run, done)
    place.finish(plan)
    written = sum(shard.records for shard in files.read_manifest(run.data.path).shards)
    file = run.data.path / files.REJECTED
    return Prepared(written, len(file.read_bytes().splitlines()) if file.exists() else 0)


def _report_repeating(run: PrepareRun, done: Mapping[int, Block]) -> None:
    repeating = [video for _, block in sorted(done.items()) for video in block.repeating]
    if repeating:
        written = sum(len(block.entries) for block in done.values())
        console.log(
            f"note: {len(repeating)} of {written} clips, such as {repeating[0]}, show the same frame twice in a row: "
            f"nothing moves in them, or their videos have fewer frames per second than clip.fps={run.clip.fps}"
        )
