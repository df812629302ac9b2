"""metadata.csv: the list of clips and their prompts."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple, TextIO

from tfm_jax.errors import InputError

METADATA_FILE = "metadata.csv"

PROBLEMS_SHOWN = 3


class Clip(NamedTuple):
    """A row of metadata.csv."""

    path: Path
    """The video file, which exists and is inside the folder even after links are resolved."""
    video: str
    """The path as written in metadata.csv, relative to the folder."""
    prompt: str
    """May be empty."""
    line: int
    """The line of metadata.csv on which the row starts, counted from 1."""


class _BadRow(Exception):
    """A row cannot be used; the message says why, and what was expected."""


def read_metadata(folder: Path) -> list[Clip]:
    """Read the rows of `folder/metadata.csv`: UTF-8, comma-separated, with columns `video` and `prompt`.

    Other columns are ignored. A video may have several prompts, each in its own row.

    Raises:
        InputError: the table or some of its rows cannot be used. The message names the file, and the lines and problems
            of the first few bad rows.
    """
    file = folder / METADATA_FILE
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected a table with the columns video and prompt")
    clips: dict[tuple[str, str], Clip] = {}
    problems: list[tuple[int, str]] = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            for line, header, row in _rows(stream, file):
                try:
                    clip = _clip(line, header, row, folder)
                    same = clips.setdefault((os.path.realpath(clip.path), clip.prompt), clip)
                    if same is not clip:
                        raise _BadRow(f"repeats the video and prompt of line {same.line}; expected each pair once")
                except _BadRow as problem:
                    problems.append((line, str(problem)))
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start} is not UTF-8; expected a UTF-8 table") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a readable table") from None
    if problems:
        raise InputError(_report(file, problems))
    if not clips:
        raise InputError(f"{file}: no rows; expected a row for every clip")
    return list(clips.values())


def _report(file: Path, problems: list[tuple[int, str]]) -> str:
    if len(problems) == 1:
        [(line, problem)] = problems
        return f"{file}:{line}: {problem}"
    shown = [f"line {line}: {problem}" for line, problem in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        shown.append(f"and {len(problems) - PROBLEMS_SHOWN} more")
    return f"{file}: {len(problems)} bad rows; {'; '.join(shown)}"


def _rows(stream: TextIO, file: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield the number of the first line, the column names and the fields of every row. Skip blank lines."""
    reader = csv.reader(stream, strict=True)  # limits a field to 131072 characters
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if not header:
                header = row
                _check_header(header, file)
            elif row:
                yield line, header, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}:{line}: {error}; expected comma-separated values") from None


def _check_header(header: list[str], file: Path) -> None:
    for name in ("video", "prompt"):
        if header.count(name) != 1:
            found = f"{header.count(name)} columns {name!r} among {', '.join(map(_quote, header)) or 'none'}"
            raise InputError(f"{file}:1: {found}; expected one, in a header such as video,prompt")


def _clip(line: int, header: list[str], row: list[str], folder: Path) -> Clip:
    if len(row) != len(header):
        expected = f"expected {len(header)} as in the header (quote a prompt that contains commas)"
        raise _BadRow(f"{len(row)} field{'s' if len(row) > 1 else ''}; {expected}")
    fields = dict(zip(header, row, strict=True))
    video = fields["video"]
    try:
        return Clip(_locate(video, folder), video, fields["prompt"], line)
    except _BadRow as problem:
        raise _BadRow(f"video={_quote(video)}: {problem}") from None


def _locate(video: str, folder: Path) -> Path:
    """Return the path of a video, which must be a file inside the folder."""
    relative = "expected a path relative to the folder of metadata.csv"
    if not video.strip():
        raise _BadRow(f"is empty; {relative}")
    if "\0" in video:
        raise _BadRow(f"contains a NUL character; {relative}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", video):
        raise _BadRow("is a URL; expected a file in the folder of metadata.csv; download it first")
    if PurePosixPath(video).is_absolute() or PureWindowsPath(video).is_absolute():
        raise _BadRow(f"is an absolute path; {relative}")
    path = folder / video
    root = os.path.realpath(folder)
    try:
        # Path.resolve raises RuntimeError on circular links; realpath does not.
        inside = Path(os.path.realpath(path)).is_relative_to(root)
        if ".." in PurePosixPath(video).parts or not inside:
            raise _BadRow(f"is outside the folder; {relative}")
        if not path.is_file():
            raise _BadRow(f"no such file; expected a video in {folder}")
    except OSError as error:  # such as a name that is too long
        raise _BadRow(f"{error.strerror}; {relative}") from None
    return path


def _quote(value: str) -> str:
    """Return a value in quotes, on one line of at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:96]}...'"
