"""Lists of clips and their prompts: finds the list, reads its rows and checks them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tfm_jax.data import metadata_formats as formats
from tfm_jax.data.metadata_formats import FIELD_LIMIT, Fields, Origin, Row
from tfm_jax.data.paths import BadRow, locate
from tfm_jax.errors import InputError
from tfm_jax.inputs import short_repr

METADATA_FILE = "metadata.csv"
METADATA_FILES = (METADATA_FILE, "metadata.json", "metadata.jsonl", "sharegpt4video_40k.jsonl")
"""The files in which `find_metadata` looks for the clips of a folder."""

ZIP_FOLDER = "zip_folder"
"""The folder of ShareGPT4Video's videos, beside the annotations."""

PROBLEMS_SHOWN = 3


class Clip(NamedTuple):
    """A video or image with its prompt."""

    path: Path
    """The file, which may be missing. Unless it was given as an absolute path, it is inside the folder, even after
    links are resolved."""
    video: str
    """The path as written in the list."""
    prompt: str
    """May be empty."""
    origin: Origin
    """Where in the list the clip is given."""


class Metadata(NamedTuple):
    """A list of clips."""

    path: Path
    """The file or, for pairs of files, the folder."""
    format: str
    """Name of the format, for messages."""
    folder: Path
    """Folder of the clips, to which relative paths refer."""
    rows: Callable[[Path], Iterator[Row]]
    """Reads the rows from `path`."""


def read_metadata(source: Path | Metadata, absolute_paths: bool = False) -> list[Clip]:
    """Read a list of clips.

    A clip may have several prompts, each in its own row. Fields other than the video and the prompt are ignored. The
    files of the clips are not looked at.

    Args:
        source: see `find_metadata`.
        absolute_paths: also accept absolute paths, which may point anywhere.

    Raises:
        InputError: there is no list, or the list or some of its rows cannot be used. The message names the file, and
            the places and problems of the first few bad rows.
    """
    metadata = source if isinstance(source, Metadata) else find_metadata(source)
    clips: dict[tuple[str, str], Clip] = {}
    problems: list[tuple[Origin, str]] = []
    try:
        for origin, fields in metadata.rows(metadata.path):
            try:
                clip = _clip(origin, fields, metadata.folder, absolute_paths)
                same = clips.setdefault((os.path.realpath(clip.path), clip.prompt), clip)
                if same is not clip:
                    raise BadRow(f"repeats the video and prompt of {same.origin}; expected each pair once")
            except BadRow as problem:
                problems.append((origin, str(problem)))
    except OSError as error:
        raise InputError(f"{metadata.path}: {error.strerror}; expected a readable list of clips") from None
    if problems:
        raise InputError(_report(metadata.path, problems))
    if not clips:
        raise InputError(f"{metadata.path}: no rows; expected a row for every clip")
    return list(clips.values())


def find_metadata(source: Path) -> Metadata:
    """Find the list of clips.

    Args:
        source: a file that lists clips (.csv, .json or .jsonl), or the folder of a file in `METADATA_FILES`. A folder
            without such a file may contain pairs of a clip and a text file, such as a.mp4 and a.txt.

    Raises:
        InputError: there is no such file or folder, or the folder contains no list of clips, or several.
    """
    try:
        if not source.is_dir():
            return _open(source)
        found = [name for name in METADATA_FILES if os.path.lexists(source / name)]
        if len(found) > 1:
            choice = f"expected one of them; to choose, give the file itself, such as {source / found[0]}"
            raise InputError(f"{source}: contains {' and '.join(found)}; {choice}")
        if found:
            return _open(source / found[0])
        if any((source / text).is_file() for text in formats.find_pairs(source).values()):
            return Metadata(source, "pairs of clip and text file", source, formats.read_pairs)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}; expected a folder of clips") from None
    names = f"{', '.join(METADATA_FILES[:-1])} or {METADATA_FILES[-1]}"
    raise InputError(f"{source}: lists no clips; expected {names}, or pairs of files such as a.mp4 and a.txt")


def _open(file: Path) -> Metadata:
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected a list of clips and their prompts, or the folder of one")
    suffix, folder = file.suffix.lower(), file.parent
    if suffix == ".csv":
        return Metadata(file, "CSV", folder, formats.read_csv)
    if suffix == ".json":
        return Metadata(file, "JSON", folder, formats.read_json)
    if suffix == ".jsonl" and formats.is_sharegpt4video(file):
        videos = folder / ZIP_FOLDER
        return Metadata(file, "ShareGPT4Video", videos if videos.is_dir() else folder, formats.read_sharegpt4video)
    if suffix == ".jsonl":
        return Metadata(file, "JSONL", folder, formats.read_jsonl)
    raise InputError(f"{file}: unknown file type; expected a folder or a file of type .csv, .json or .jsonl")


def _clip(origin: Origin, fields: Fields | BadRow, folder: Path, absolute_paths: bool) -> Clip:
    if isinstance(fields, BadRow):
        raise fields
    for name, value in fields._asdict().items():
        if len(value) > FIELD_LIMIT:
            raise BadRow(f"{name} has {len(value):,} characters; expected at most {FIELD_LIMIT:,}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair; a file name may be any bytes
            text = short_repr(value[error.start : error.end])
            raise BadRow(f"{name} contains {text}, which is not Unicode; expected Unicode text") from None
    try:
        return Clip(locate(fields.video, folder, absolute_paths), fields.video, fields.prompt, origin)
    except BadRow as problem:
        raise BadRow(f"video={short_repr(fields.video)}: {problem}") from None


def _report(path: Path, problems: list[tuple[Origin, str]]) -> str:
    if len(problems) == 1:
        [(origin, problem)] = problems
        place = f"{path}:{origin.value}" if origin.kind == "line" else f"{path}: {origin}"
        return f"{place}: {problem}"
    shown = [f"{origin}: {problem}" for origin, problem in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        shown.append(f"and {len(problems) - PROBLEMS_SHOWN} more")
    return f"{path}: {len(problems)} bad rows; {'; '.join(shown)}"
