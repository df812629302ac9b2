"""Reads the headers of all clips and says which training clips they give, before anything is encoded."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tfm_jax.config import ClipConfig
from tfm_jax.data.buckets import Bucket
from tfm_jax.data.clips import Rejected, Windows, choose_windows
from tfm_jax.data.metadata import Clip
from tfm_jax.errors import InputError
from tfm_jax.video_headers import Header, read_header

MAX_THREADS = 32
"""More than the cores of a small machine, because threads wait for files, above all on network disks."""


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
            return Surveyed(row, None, Rejected(str(error).removeprefix(f"{row.path}: ")))
        return Surveyed(row, header, choose_windows(header, clip, row.video, seed))

    threads = ThreadPoolExecutor(min(MAX_THREADS, 4 * (os.cpu_count() or 1)))
    try:
        return list(tqdm(threads.map(read, rows), desc="reading headers", unit="file", total=len(rows)))
    finally:
        threads.shutdown(cancel_futures=True)  # on Ctrl-C, the files that have not been read are not


def check_length(surveyed: Sequence[Surveyed], clip: ClipConfig) -> None:
    """Raise InputError if a video is too short and `clip.short` says to refuse it."""
    short = [(row, chosen) for row, _, chosen in surveyed if isinstance(chosen, Rejected) and chosen.too_short]
    if clip.short == "refuse" and short:
        row, chosen = short[0]
        count = f"{len(short)} of {len(surveyed)} clips are too short"
        raise InputError(f"clip.short=refuse: {count}; the first one: {row.path}: {chosen.reason}")


def check_sizes(surveyed: Sequence[Surveyed], output: Path) -> Bucket:
    """Return the size of all clips.

    Raises:
        InputError: the clips have several sizes, or no clip can be used.
    """
    buckets = list(used_buckets(surveyed))
    if not buckets:
        row, _, chosen = surveyed[0]
        reason = chosen.reason if isinstance(chosen, Rejected) else ""
        raise none_usable(output, len(surveyed), f"{row.path}: {reason}")
    if len(buckets) > 1:
        sizes = ", ".join(map(str, buckets[:3])) + (", ..." if len(buckets) > 3 else "")
        found = f"the clips have {len(buckets)} sizes ({sizes})"
        raise InputError(f"data.path={output}: {found}; expected one, as all latents in a folder have the same size")
    return buckets[0]


def none_usable(output: Path, count: int, problem: str) -> InputError:
    return InputError(f"{output}: none of the {count} clips can be used; the first problem: {problem}")


def used_buckets(surveyed: Sequence[Surveyed]) -> dict[Bucket, list[Surveyed]]:
    """Return the rows of every size that occurs, the most frequent size first."""
    found: dict[Bucket, list[Surveyed]] = {}
    for entry in surveyed:
        if isinstance(entry.chosen, Windows):
            found.setdefault(entry.chosen.bucket, []).append(entry)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))
