"""metadata.csv: which clips there are, and what each of them shows."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple, TextIO

from tfm_jax.errors import InputError

NAME = "metadata.csv"


class Clip(NamedTuple):
    """A row of metadata.csv."""

    path: Path
    """The video file; checked to exist and to lie in the folder, links followed."""
    video: str
    """Its name in metadata.csv, relative to the folder."""
    prompt: str
    """May be empty."""
    line: int
    """Where the row starts in metadata.csv, from 1."""


def read_metadata(folder: Path) -> list[Clip]:
    """The rows of `folder/metadata.csv`: UTF-8, comma-separated, columns `video` and `prompt`, any others ignored.

    A video may come with several prompts, in rows of their own.

    Raises:
        InputError: with file, line, field and value: what is wrong with the table, or with a path in it.
    """
    file = folder / NAME
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected a table with the columns video and prompt")
    clips: dict[tuple[Path, str], Clip] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            for line, row in _rows(stream, file):
                clip = Clip(_locate(row["video"], folder, f"{file}:{line}"), row["video"], row["prompt"], line)
                same = clips.setdefault((clip.path.resolve(), clip.prompt), clip)
                if same is not clip:
                    raise InputError(f"{file}:{line}: the same video and prompt as line {same.line}; expected one row")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start} is not UTF-8; expected a UTF-8 table") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a readable table") from None
    if not clips:
        raise InputError(f"{file}: no rows; expected a row for every clip")
    return list(clips.values())


def _rows(stream: TextIO, file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields by column, row by row; blank lines are skipped."""
    reader = csv.reader(stream, strict=True)  # its limit of 128 KiB a field stands
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if not header:
                header = row
                _check_header(header, file)
            elif row and len(row) != len(header):
                expected = f"expected {len(header)} as in the header (quote a prompt that has commas in it)"
                raise InputError(f"{file}:{line}: {len(row)} fields; {expected}")
            elif row:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}:{line}: {error}; expected comma-separated values") from None


def _check_header(header: list[str], file: Path) -> None:
    for name in ("video", "prompt"):
        if header.count(name) != 1:
            found = f"{header.count(name)} columns {name!r} among {', '.join(map(_quote, header)) or 'none'}"
            raise InputError(f"{file}:1: {found}; expected one, in a first line such as video,prompt")


def _locate(video: str, folder: Path, where: str) -> Path:
    """The path of a clip, which must lie inside the folder."""

    def refuse(problem: str, expected: str = "a path relative to the folder of metadata.csv") -> InputError:
        return InputError(f"{where}: video={_quote(video)}: {problem}; expected {expected}")

    if not video.strip():
        raise refuse("empty")
    if "\0" in video:
        raise refuse("has a NUL character")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", video):
        raise refuse("a URL", "a file in the folder of metadata.csv; download it first")
    if PurePosixPath(video).is_absolute() or PureWindowsPath(video).is_absolute():
        raise refuse("an absolute path")
    path = folder / video
    if ".." in PurePosixPath(video).parts or not path.resolve().is_relative_to(folder.resolve()):
        raise refuse("leads out of the folder")
    if not path.is_file():
        raise refuse("no such file", f"a video in {folder}")
    return path


def _quote(value: str) -> str:
    """On one line, and not longer than a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:96]}...'"
