"""Read files made by other programs. Every problem with such a file becomes an `InputError` of one line."""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import pydantic

from tfm_jax.errors import InputError

MAX_JSON_BYTES = 8 * 2**20
"""Far more than any configuration, index or header of Wan. Parsed JSON takes up to thirty times its size in memory."""

Model = TypeVar("Model", bound=pydantic.BaseModel)


def check_download(file: Path) -> None:
    """Raise InputError if a file is missing, empty, or left behind by a failed download."""
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    with open(file, "rb") as stream:
        head = stream.read(64)
    if not head:
        raise InputError(f"{file}: is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{file}: is a git-lfs pointer; run `git lfs pull` or download the file itself")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{file}: is an HTML page; download the file itself")


def read_json(file: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read the JSON object in a file of at most `limit` bytes.

    Raises:
        InputError: see `check_download` and `parse_json`.
    """
    check_download(file)
    with open(file, "rb") as stream:
        return parse_json(stream.read(limit + 1), file, limit)


def parse_json(text: str | bytes, place: str | Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse the JSON object in `text`; error messages start with `place`.

    Raises:
        InputError: the text is longer than `limit`, not UTF-8, not JSON, nested too deeply or not an object, or it
            repeats a key or contains a number that is not finite.
    """
    if len(text) > limit:
        raise InputError(f"{place}: more than {limit} bytes of JSON; expected a small file")
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        values = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_not_finite, parse_float=_finite)
    except RecursionError:
        raise InputError(f"{place}: JSON nested too deeply; expected a few levels") from None
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{place}: a JSON {type(values).__name__}; expected an object with fields, {{...}}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"key {short_repr(name)} is given twice")
        values[name] = value
    return values


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{short_repr(text)} is not a finite number")


def validate(
    model: type[Model], values: Mapping[str, Any], place: str | Path, names: Mapping[str, str] = MappingProxyType({})
) -> Model:
    """Validate `values` with a pydantic model.

    Args:
        place: the file to name in error messages.
        names: maps fields of the model to keys in the file, for fields that have a different name there.

    Raises:
        InputError: a value is missing or invalid. The message names the file, the field, its value and what was
            expected.
    """
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field, *rest = problem["loc"]
        name = names.get(str(field), str(field)) + "".join(f"[{part}]" for part in rest)
        if problem["type"] == "missing":
            raise InputError(f"{place}: {name} is missing") from None
        expected = problem["msg"].replace("Input should be", "expected").replace("tuple", "list")
        raise InputError(f"{place}: {name} is {short_repr(problem['input'])}; {expected}") from None


def short_repr(value: Any) -> str:
    """Return `repr(value)`, abbreviated to fit into an error message."""
    return _repr.repr(value)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlevel = 2
