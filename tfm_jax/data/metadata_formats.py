"""The formats in which clips are listed. A reader yields the rows of a list, good and bad."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from tfm_jax import images, video
from tfm_jax.data.paths import BadRow, locate
from tfm_jax.errors import InputError
from tfm_jax.inputs import check_download, short_repr

FIELD_LIMIT = 2**17
"""Maximum number of characters in a field, as in Python's csv module."""

LINE_LIMIT = 8 * 2**20
"""Maximum number of bytes in a line of a JSONL file."""

JSON_LIMIT = 256 * 2**20
"""Maximum number of bytes in a JSON file, which is read as a whole."""

SUMMARY = "-1"
"""`idx` of the caption that summarises the whole video, in ShareGPT4Video's annotations."""


class Origin(NamedTuple):
    """Where a row comes from: a line of a table, counted from 1; an index in a JSON list, from 0; or a file."""

    kind: Literal["line", "index", "file"]
    value: int | str

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"


class Fields(NamedTuple):
    """What a row says about a clip."""

    video: str
    prompt: str


Row = tuple[Origin, Fields | BadRow]
"""A row, or what is wrong with it."""


# --- CSV -------------------------------------------------------------------------------------------------------------


def read_csv(file: Path) -> Iterator[Row]:
    """Yield the rows of a comma-separated table with the columns `video` and `prompt`. Blank lines are skipped.

    Raises:
        InputError: the file is not UTF-8 or not a table, or it lacks a column.
    """
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, strict=True)  # limits the length of a field to FIELD_LIMIT
        header: list[str] = []
        line = 1
        try:
            for row in reader:
                if not header:
                    header = row
                    _check_header(header, file)
                elif row:
                    yield Origin("line", line), _csv_fields(header, row)
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{file}:{line}: {error}; expected comma-separated values") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: byte {error.start} is not UTF-8; expected a UTF-8 table") from None


def _check_header(header: list[str], file: Path) -> None:
    for name in Fields._fields:
        if header.count(name) != 1:
            found = f"{header.count(name)} columns {name!r} among {', '.join(map(short_repr, header)) or 'none'}"
            raise InputError(f"{file}:1: {found}; expected one, in a header such as video,prompt")


def _csv_fields(header: list[str], row: list[str]) -> Fields | BadRow:
    if len(row) != len(header):
        expected = f"expected {len(header)} as in the header (quote a prompt that contains commas)"
        return BadRow(f"{len(row)} field{'s' if len(row) > 1 else ''}; {expected}")
    values = dict(zip(header, row, strict=True))
    return Fields(values["video"], values["prompt"])


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(file: Path) -> Iterator[Row]:
    """Yield the objects of a JSON list; their fields `video` and `prompt` are texts.

    Raises:
        InputError: the file is not a JSON list, not UTF-8, or larger than `JSON_LIMIT`.
    """
    check_download(file)
    with file.open("rb") as stream:
        content = stream.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise InputError(f"{file}: more than {JSON_LIMIT:,} bytes; expected a JSONL file, which is read line by line")
    try:
        values = _parse(content)
    except BadRow as problem:
        raise InputError(f"{file}: {problem}") from None
    if not isinstance(values, list):
        raise InputError(f"{file}: is JSON, but no list; expected a list of objects, [{{...}}, ...]")
    for index, value in enumerate(values):
        yield Origin("index", index), _attempt(_json_fields, value)


def read_jsonl(file: Path) -> Iterator[Row]:
    """Yield the objects of a file with one JSON object per line; their fields `video` and `prompt` are texts.

    Raises:
        InputError: a line is longer than `LINE_LIMIT`.
    """
    return _read_lines(file, _json_fields)


def read_sharegpt4video(file: Path) -> Iterator[Row]:
    """Yield the rows of an annotation file of ShareGPT4Video, such as sharegpt4video_40k.jsonl.

    The video is `video_path`, and the prompt is the last of the `captions`, which summarises the whole video and has
    the `idx` -1. (https://huggingface.co/datasets/ShareGPT4Video/ShareGPT4Video)

    Raises:
        InputError: a line is longer than `LINE_LIMIT`.
    """
    return _read_lines(file, _sharegpt4video_fields)


def is_sharegpt4video(file: Path) -> bool:
    """Whether the first line of a JSONL file is an annotation of ShareGPT4Video."""
    try:
        with file.open("rb") as stream:
            _, first = next(_lines(stream, file))
        values = _parse(first)
    except (StopIteration, BadRow, InputError, OSError):
        return False
    return isinstance(values, dict) and {"video_path", "captions"} <= values.keys() and "video" not in values


def _read_lines(file: Path, pick: Callable[[Any], Fields]) -> Iterator[Row]:
    check_download(file)
    with file.open("rb") as stream:
        for number, line in _lines(stream, file):
            yield Origin("line", number), _attempt(lambda line: pick(_parse(line)), line)


def _lines(stream: BinaryIO, file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers. Only LF ends a line."""
    number = 1
    while line := stream.readline(LINE_LIMIT + 1):
        if len(line) > LINE_LIMIT:
            raise InputError(f"{file}:{number}: more than {LINE_LIMIT:,} bytes; expected one JSON object per line")
        if line.strip(b"\xef\xbb\xbf \t\r\n" if number == 1 else None):
            yield number, line
        number += 1


def _attempt(read: Callable[..., Fields], *args: Any) -> Fields | BadRow:
    try:
        return read(*args)
    except BadRow as problem:
        return problem


class _Repeated(NamedTuple):
    """Stands for a JSON object that gives a key more than once."""

    key: str

    def __repr__(self) -> str:
        return f"{{{self.key!r}: ..., {self.key!r}: ...}}"


def _collect(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            return _Repeated(key)
        values[key] = value
    return values


def _parse(content: bytes) -> Any:
    """Parse JSON. An object that repeats a key becomes `_Repeated`, so that the rows around it can still be read."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_collect)
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} is not UTF-8; expected UTF-8 text") from None
    except RecursionError:
        raise BadRow("JSON nested too deeply; expected a few levels") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise BadRow(f"not JSON ({error.msg}, {place}); expected JSON") from None
    except ValueError as error:  # an integer of thousands of digits
        raise BadRow(f"JSON that cannot be read ({error}); expected ordinary values") from None


def _json_fields(values: Any) -> Fields:
    _check_object(values, "an object with the fields video and prompt")
    return Fields(_text(values, "video"), _text(values, "prompt"))


def _sharegpt4video_fields(values: Any) -> Fields:
    _check_object(values, "an object with the fields video_path and captions")
    captions = values.get("captions")
    if not isinstance(captions, list) or not captions:
        raise BadRow(f"captions is {short_repr(captions)}; expected a list of objects")
    _check_object(captions[-1], "an object with the fields idx and content for every caption")
    idx = captions[-1].get("idx")
    if str(idx) != SUMMARY:
        raise BadRow(f"the last caption has idx {short_repr(idx)}; expected {SUMMARY}, the summary of the video")
    return Fields(_text(values, "video_path"), _text(captions[-1], "content"))


def _check_object(values: Any, expected: str) -> None:
    if isinstance(values, _Repeated):
        raise BadRow(f"key {short_repr(values.key)} is given twice; expected {expected}")
    if not isinstance(values, dict):
        raise BadRow(f"{short_repr(values)} is no object; expected {expected}")


def _text(values: dict[str, Any], name: str) -> str:
    if name not in values:
        raise BadRow(f"{name} is missing; expected it as a text")
    if not isinstance(values[name], str):
        raise BadRow(f"{name}={short_repr(values[name])}: expected a text")
    return values[name]


# --- Pairs of files --------------------------------------------------------------------------------------------------


def find_pairs(folder: Path) -> dict[str, str]:
    """Map the videos and images of a folder to their text files: `a.mp4` to `a.txt`. Hidden files are ignored.

    The text files need not exist.
    """
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    known = {*video.CONTAINERS, *images.SUFFIXES}
    return {name: f"{Path(name).stem}.txt" for name in names if Path(name).suffix.lower() in known}


def read_pairs(folder: Path) -> Iterator[Row]:
    """Yield the videos and images of a folder, each with the text file of the same name, which contains its prompt.

    White space around a prompt is stripped. Other files are ignored.
    """
    for name, text in find_pairs(folder).items():
        origin = Origin("file", text if (folder / text).is_file() else name)
        yield origin, _attempt(_read_pair, folder, name, text)


def _read_pair(folder: Path, name: str, text: str) -> Fields:
    try:
        file = locate(text, folder)
        if not file.is_file():
            raise BadRow(f"no such file; expected it in {folder}")
        with file.open("rb") as stream:
            content = stream.read(4 * FIELD_LIMIT + 1)  # a character has at most 4 bytes
        return Fields(name, content.decode("utf-8-sig").strip())
    except BadRow as problem:
        raise BadRow(f"text file {text}: {problem}") from None
    except UnicodeDecodeError as error:
        raise BadRow(f"text file {text}: byte {error.start} is not UTF-8; expected UTF-8 text") from None
    except OSError as error:
        raise BadRow(f"text file {text}: {error.strerror}; expected a readable file") from None
