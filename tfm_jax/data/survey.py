"""Reads the headers of all clips and says which training clips they give, before anything is encoded."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from tfm_jax import processes
from tfm_jax.config import ClipConfig, DataConfig
from tfm_jax.data.buckets import Bucket
from tfm_jax.data.clips import Rejected, Windows, choose_windows
from tfm_jax.data.format import Line
from tfm_jax.data.metadata import Clip
from tfm_jax.errors import InputError
from tfm_jax.video_headers import Header, read_header

MAX_THREADS = 32
"""More than the cores of a small machine, because threads wait for files, above all on network disks."""


REASONS_SHOWN = 10
"""Number of reasons in the message about too many rejected videos."""


class Surveyed(NamedTuple):
    """A row of the list of clips, and what becomes of it."""

    row: Clip
    header: Header | None
    """None if it cannot be read."""
    chosen: Windows | Rejected


def survey(rows: Sequence[Clip], clip: ClipConfig, seed: int) -> list[Surveyed]:
    """Read the headers of all clips in parallel, with a progress bar, and choose the training clips."""

    def read(row: Clip) -> Surveyed:
        try:
            header = read_header(row.path)
        except InputError as error:
            return Surveyed(row, None, Rejected(without_path(error, row)))
        return Surveyed(row, header, choose_windows(header, clip, row.video, seed))

    threads = ThreadPoolExecutor(min(MAX_THREADS, 4 * (os.cpu_count() or 1)))
    try:
        results = threads.map(read, rows)
        hidden = not processes.is_first()
        return list(tqdm(results, desc="reading headers", unit="file", total=len(rows), disable=hidden))
    finally:
        threads.shutdown(cancel_futures=True)  # on Ctrl-C, the files that have not been read are not


def check_length(surveyed: Sequence[Surveyed], clip: ClipConfig) -> None:
    """Raise InputError if a video is too short and `clip.short` says to refuse it."""
    short = [(row, chosen) for row, _, chosen in surveyed if isinstance(chosen, Rejected) and chosen.too_short]
    if clip.short == "refuse" and short:
        row, chosen = short[0]
        count = f"{len(short)} of {len(surveyed)} clips are too short"
        raise InputError(f"clip.short=refuse: {count}; the first one: {row.path}: {chosen.reason}")


def rejection(row: Clip, reason: str) -> Line:
    """Return the line of rejected.jsonl for a video that cannot be used."""
    return {row.origin.kind: row.origin.value, "video": row.video, "reason": reason}


def without_path(error: InputError, row: Clip) -> str:
    """Return what is wrong with the file of a row, without its path."""
    return str(error).removeprefix(f"{row.path}: ")


def check_rejected(rejected: Sequence[Line], rows: int, data: DataConfig) -> None:
    """Raise InputError if too many of the `rows` videos cannot be used. The message gives the reasons."""
    if len(rejected) / rows > data.max_rejected:
        found = f"{len(rejected)} of the {rows} videos cannot be used"
        raise InputError(f"data.max_rejected={data.max_rejected:g}: {found}: {count_reasons(rejected)}")


def count_reasons(rejected: Sequence[Line]) -> str:
    """Return `list_reasons` in one line."""
    return "; ".join(list_reasons(rejected))


def list_reasons(rejected: Sequence[Line]) -> list[str]:
    """Return the most frequent reasons of rejections, each with its number and its first video."""
    alike: dict[str, list[Line]] = {}
    for line in rejected:
        alike.setdefault(_kind(line), []).append(line)
    kinds = sorted(alike.values(), key=len, reverse=True)
    shown = [f"{len(lines)} like {lines[0]['video']}: {lines[0]['reason']}" for lines in kinds[:REASONS_SHOWN]]
    return [*shown, *(["..."] if len(kinds) > REASONS_SHOWN else [])]


def _kind(line: Line) -> str:
    """Return the reason of a rejection without its numbers, so that equal reasons can be counted."""
    return re.sub(r"\d[\d.,]*(?<=\d)", "N", str(line["reason"]))


def used_buckets(surveyed: Sequence[Surveyed]) -> dict[Bucket, list[Surveyed]]:
    """Return the rows of every size that occurs, the most frequent size first."""
    found: dict[Bucket, list[Surveyed]] = {}
    for entry in surveyed:
        if isinstance(entry.chosen, Windows):
            found.setdefault(entry.chosen.bucket, []).append(entry)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))
