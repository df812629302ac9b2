"""Read a configuration: a YAML file of sections, and fields that override it. Report a mistake in one line."""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

import pydantic
import yaml

from tfm_jax import plain_yaml
from tfm_jax.config.fields import PACKAGE
from tfm_jax.config.sections import Config
from tfm_jax.errors import InputError
from tfm_jax.files import replacing

T = TypeVar("T")

SHIPPED = PACKAGE / "configs"
"""Folder of the configurations that are installed with the package. `load` finds them by name."""


def load(schema: type[T], file: str | Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> T:
    """Read the sections of a dataclass from a YAML file.

    Args:
        schema: the dataclass; each of its fields is a section.
        file: a path, or the name of a configuration in `SHIPPED`.
        overrides: `section.field` -> value, which takes precedence over the file. A text is read as on the command
            line.

    Raises:
        InputError: the file cannot be read, or a field or value is unknown, missing, repeated or invalid.
    """
    path = locate(file)
    values = read(path)
    origin = {}
    for name, value in overrides.items():
        origin[name] = f"--{name}={shown(value)}"
        if name not in _fields(schema):
            raise InputError(f"{origin[name]}: unknown field {name}; {_nearest(name, schema)}")
        part, field = name.split(".")
        values.setdefault(part, {})[field] = literal(name, value)
    wanted = {name: values[name] for name in _sections(schema) if name in values}
    return from_plain(schema, wanted, str(path), origin)


def locate(file: str | Path) -> Path:
    """Return the path of a configuration: `file` if it exists, else the configuration of that name in `SHIPPED`.

    Raises:
        InputError: neither exists.
    """
    path = Path(file)
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if os.path.lexists(path):
        return path
    if str(file) in shipped:
        return shipped[str(file)]
    raise InputError(f"{file}: no such file; expected a configuration file or one of {', '.join(shipped)}")


def literal(name: str, value: Any) -> Any:
    """Parse a value from the command line. Lists, mappings and null are written as in YAML; all else stays text."""
    if not isinstance(value, str) or not (value.startswith(("[", "{")) or value == "null"):
        return value
    try:
        return plain_yaml.parse(value, "")
    except InputError:
        kind, example = ("list", "[a, b]") if value.startswith("[") else ("mapping", "{a: 1, b: 2}")
        raise InputError(f"--{name}={shown(value)}: not a {kind}; expected one, such as {example}") from None


def read(file: Path) -> dict[str, Any]:
    """Return section -> field -> value from a YAML file. The names are checked, the values are not.

    Raises:
        InputError: the file cannot be read, or a name is unknown or repeated.
    """
    try:
        values = plain_yaml.read(file)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a configuration file") from None
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise InputError(f"{file}: expected sections ({', '.join(_sections(Config))}) with fields")
    _check_names(values, str(file))
    return values


def from_plain(schema: type[T], values: dict[str, Any], file: str, origin: Mapping[str, str] | None = None) -> T:
    """Make an instance of `schema` from section -> field -> value. Missing fields get their defaults.

    Args:
        file: the source of the values, for error messages.
        origin: field -> the command-line argument that set the field.

    Raises:
        InputError: a field is missing or unknown, or a value is invalid.
    """
    try:
        return pydantic.TypeAdapter(schema).validate_python(values)
    except pydantic.ValidationError as error:
        raise InputError(_first_problem(error, file, origin or {})) from None


def plain(config: Any) -> dict[str, dict[str, Any]]:
    """Return section -> field -> value, with values of JSON types."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def dump(config: Any, path: Path) -> None:
    """Write a configuration as a YAML file that `load` can read."""
    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _sections(schema: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(schema).items() if dataclasses.is_dataclass(hint)}


def _fields(schema: type) -> Iterator[str]:
    for name, part in _sections(schema).items():
        yield from (f"{name}.{field.name}" for field in dataclasses.fields(part))


def _check_names(values: dict[str, Any], file: str) -> None:
    sections = _sections(Config)
    for name, part in values.items():
        if name not in sections:
            close = difflib.get_close_matches(str(name), sections)
            raise InputError(f"{file}: unknown section {name}; {_choices(close, sections)}")
        for field, value in part.items():
            full = f"{name}.{field}"
            if full not in _fields(Config):
                raise InputError(f"{file}: unknown field {full}; {_nearest(full, Config)}")
            if isinstance(value, bool) and get_type_hints(sections[name])[field] is not bool:
                raise InputError(f"{file}: {full}={shown(value)}: booleans are not accepted here; put text in quotes")


NEAR = 0.72
"""Minimum similarity of a suggested name: for `lernin_rate` learning_rate is suggested, but for `tensorboard` tensor is
not."""


def _nearest(name: str, schema: type) -> str:
    """Suggest fields with similar names, those of the same section first, or else list the possible names."""
    part, _, tail = name.rpartition(".")
    fields: dict[str, list[str]] = {}
    for full in sorted(_fields(schema), key=lambda full: not full.startswith(f"{part}.")):
        fields.setdefault(full.rpartition(".")[2], []).append(full)
    close = [full for match in difflib.get_close_matches(tail, fields, cutoff=NEAR) for full in fields[match]]
    names = [full for full in _fields(schema) if full.startswith(f"{part}.")] or [f"{n}.*" for n in _sections(schema)]
    return _choices(close[:3], names)


def _choices(close: Iterable[str], names: Iterable[str]) -> str:
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"


_EXPECTED = {
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "less_than": "expected less than {lt:g}",
    "less_than_equal": "expected at most {le:g}",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "string_type": "expected text",
    "string_too_short": "expected text that is not empty",
    "path_type": "expected a path",
    "literal_error": "expected {expected}",
    "tuple_type": "expected a list, such as [a, b]",
    "too_short": "expected at least {min_length} of them",
    "unexpected_keyword_argument": "expected a field of this version of tfm_jax",
}
"""Type of a pydantic error -> what was expected, to be formatted with the context of the error."""


def _first_problem(error: pydantic.ValidationError, file: str, origin: Mapping[str, str]) -> str:
    """Describe the first problem in one line: the file or option, the field, its value, and what was expected."""
    problem, *others = error.errors()
    name = ".".join(part for part in problem["loc"][:2] if isinstance(part, str))  # numbers are indices into a list
    context = problem.get("ctx", {})
    if problem["type"] == "missing":
        return f"{file}: {name} is missing; expected it in the file{f' or as --{name}=...' if '.' in name else ''}"
    if problem["type"] == "value_error":  # raised in __post_init__; its message begins with the field
        field, _, expected = str(context["error"]).partition(": ")
        name, given = f"{name}.{field.partition('=')[0]}", f"{name}.{field}"
    else:
        # A value of several possible types has one problem for each; the last part of its place is the type.
        alternatives = [other for other in others if len(other["loc"]) > 2 and other["loc"][:-1] == problem["loc"][:-1]]
        expected = " or ".join([_expected(problem), *(_expected(o).removeprefix("expected ") for o in alternatives)])
        given = f"{name}={shown(problem['input'])}"
    return f"{origin[name]}: {expected}" if name in origin else f"{file}: {given}: {expected}"


def _expected(problem: Mapping[str, Any]) -> str:
    known = _EXPECTED.get(problem["type"])
    return known.format(**problem.get("ctx", {})) if known else problem["msg"]


def shown(value: Any) -> str:
    """Format a value as in the file and on the command line, cut to at most 100 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{shown(key)}: {shown(part)}' for key, part in value.items())}}}"
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
