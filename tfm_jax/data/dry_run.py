"""The dry run of tfm-prepare: what it would encode, how much space that takes, and what it would leave out."""

import csv
import functools
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from tfm_jax import config as configs
from tfm_jax.arrays import DTYPES, TEXT_LENGTH
from tfm_jax.data.buckets import Bucket
from tfm_jax.data.clips import Rejected, Windows
from tfm_jax.data.prepare import PrepareRun, read_list
from tfm_jax.data.survey import Surveyed, check_length, check_rejected, rejection, survey, used_buckets
from tfm_jax.errors import InputError
from tfm_jax.files import check_output_directory, replacing
from tfm_jax.wan.components import TRANSFORMER
from tfm_jax.wan.sources import find_source_or_none
from tfm_jax.wan.transformer import TransformerConfig

COLUMNS = ("file", "frames", "fps", "seconds", "seconds used", "seconds unused", "clips", "bucket", "skipped because")

SHOWN = 10
"""Number of frame rates and of reasons that the report on the console shows."""


def dry_run(run: PrepareRun) -> None:
    """Read the headers of all clips, write the table `report_file(run.data.path)` and print a summary.

    Raises:
        InputError: the list of clips is not as expected, `run.data.path` cannot be a folder, or a clip is too short and
            `run.clip.short` says to refuse it.
    """
    check_output_directory("data.path", run.data.path)
    _, rows = read_list(run)
    surveyed = survey(rows, run.clip, run.data.seed)
    report = report_file(run.data.path)
    write_report(surveyed, report)
    print("\n".join(_describe(surveyed, run)))
    print(f"{report}: a line for each of the {len(surveyed):,} files")
    check_length(surveyed, run.clip)


def report_file(output: Path) -> Path:
    """Return the path of the table: beside the folder of the latents, which may not exist yet."""
    return output.with_name(f"{output.name}.report.csv")


def write_report(surveyed: Sequence[Surveyed], file: Path) -> None:
    """Write a table with a line for each row of the list of clips."""
    with replacing(file) as scratch, open(scratch, "w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        table = csv.writer(out)
        table.writerow(COLUMNS)
        table.writerows(map(_line, surveyed))


def _line(entry: Surveyed) -> list[str]:
    row, header, chosen = entry
    about = ["", "", ""]
    if header is not None:
        about = [str(header.frames), _rate(header.fps), f"{float(header.seconds):.3f}"]
    if isinstance(chosen, Rejected):
        return [row.video, *about, "0.000", about[2], "0", "", chosen.reason]
    used = [f"{float(seconds):.3f}" for seconds in (chosen.seconds, _unused(entry))]
    return [row.video, *about, *used, str(len(chosen.starts)), str(chosen.bucket), ""]


def _describe(surveyed: Sequence[Surveyed], run: PrepareRun) -> Iterator[str]:
    """Yield the lines of the summary."""
    text_dim, itemsize = _text_dim(run.model), DTYPES[run.data.dtype].itemsize
    totals = {str(bucket): _total(bucket, of, text_dim, itemsize) for bucket, of in used_buckets(surveyed).items()}
    whole = functools.reduce(_Total.plus, totals.values(), _Total())
    yield from _table(totals | {"all": whole})
    yield ""
    rates = [header.fps for _, header, _ in surveyed if header]
    yield from _counts("frames per second", Counter("image" if fps is None else _rate(fps) for fps in rates))
    rejected = [(header, chosen) for _, header, chosen in surveyed if isinstance(chosen, Rejected)]
    if rejected:
        lost = sum((header.seconds for header, _ in rejected if header), Fraction(0))
        title = f"{len(rejected):,} of {len(surveyed):,} files, {float(lost):,.0f} seconds, are left out"
        yield from _counts(title, Counter("too short" if chosen.too_short else chosen.reason for _, chosen in rejected))
    yield ""
    yield f"to encode: {float(whole.used):,.0f} seconds of video, in {whole.clips:,} calls of the autoencoder"
    yield "time: unknown before the first clip is encoded; tfm-prepare shows the time left while it runs"
    output = run.data.path.absolute()
    parent = next(path for path in (output, *output.parents) if path.exists())
    needed, free = whole.latents + whole.text, shutil.disk_usage(parent).free
    yield f"disk: at most {_size(needed)}; {_size(free)} are free{'' if needed < free else ', which is too little'}"
    try:
        check_rejected(
            [rejection(row, of.reason) for row, _, of in surveyed if isinstance(of, Rejected)], len(surveyed), run.data
        )
    except InputError as error:
        yield f"note: without --dry-run this is an error: {error}"


class _Total(NamedTuple):
    """Sums over the training clips of one size, or of all sizes."""

    clips: int = 0
    used: Fraction = Fraction(0)
    """Seconds of video."""
    unused: Fraction = Fraction(0)
    """Seconds of the same videos that are left unused."""
    latents: int = 0
    """Bytes."""
    text: int = 0
    """Bytes, if all prompts have the greatest length."""

    def plus(self, other: "_Total") -> "_Total":
        sums: list[Any] = [a + b for a, b in zip(self, other, strict=True)]
        return _Total(*sums)


def _total(bucket: Bucket, surveyed: Sequence[Surveyed], text_dim: int, itemsize: int) -> _Total:
    chosen = [entry.chosen for entry in surveyed if isinstance(entry.chosen, Windows)]
    clips = sum(len(windows.starts) for windows in chosen)
    latents = math.prod(bucket.latent_size) * TransformerConfig.channels
    return _Total(
        clips, sum((windows.seconds for windows in chosen), Fraction(0)), sum(map(_unused, surveyed), Fraction(0)),
        clips * latents * itemsize, clips * TEXT_LENGTH * text_dim * itemsize,
    )  # fmt: skip


def _table(totals: Mapping[str, _Total]) -> Iterator[str]:
    yield f"{'frames x height x width':24}{'clips':>10}{'seconds':>12}{'unused':>12}{'latents':>12}{'text at most':>14}"
    for name, (clips, used, unused, latents, text) in totals.items():
        seconds = f"{float(used):12,.0f}{float(unused):12,.0f}"
        yield f"{name:24}{clips:10,}{seconds}{_size(latents):>12}{_size(text):>14}"


def _unused(entry: Surveyed) -> Fraction:
    """Return how many seconds of a video are left unused."""
    if entry.header is None or isinstance(entry.chosen, Rejected):
        return Fraction(0)
    return max(Fraction(0), entry.header.seconds - entry.chosen.seconds)


def _text_dim(model: configs.ModelConfig) -> int:
    """Return the width of the text embeddings of the weights or, without weights, of Wan2.1-T2V."""
    found = find_source_or_none(model.path, TRANSFORMER) if model.path.exists() else None
    return found.config.text_dim if found else TransformerConfig.text_dim


def _counts(title: str, counts: Counter[str]) -> Iterator[str]:
    """Yield a title, and a line for each of the most frequent values."""
    yield f"{title}:"
    for value, count in counts.most_common(SHOWN):
        yield f"  {count:8,}  {value}"
    others = counts.total() - sum(count for _, count in counts.most_common(SHOWN))
    if others:
        yield f"  {others:8,}  others: see the table"


def _rate(fps: Fraction | None) -> str:
    return "" if fps is None else f"{float(fps):.2f}".removesuffix(".00")


def _size(count: int) -> str:
    """Format a number of bytes."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(1, count)) // 3))
    return f"{count / 1000**power:,.1f} {units[power]}" if power else f"{count} B"
