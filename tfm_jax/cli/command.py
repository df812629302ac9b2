"""What all programs share: the command line, one line for every error, exit codes, Ctrl-C and SIGTERM.

A program declares its options as one dataclass. A field `run`, if there is one, holds the sections of a configuration:
their fields become options such as `--train.steps`, whose defaults are the values of the file that `--config` names.
tyro reads the command line and prints the help; pydantic checks all values, those of the file and the options, once.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from tfm_jax import config, errors, interrupts
from tfm_jax.config import reading
from tfm_jax.errors import InputError

T = TypeVar("T")


# --- Running a program -----------------------------------------------------------------------------------------------


def run(execute: Callable[[Sequence[str]], None]) -> None:
    """Call `execute` with the arguments of the command line; if it fails, report the error and exit with its code."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax and grain log each of their steps
    try:
        with interrupts.handled():
            _check_environment()
            execute(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        described = errors.describe(error)
        if described is None:
            raise
        message, code = described
        print(f"error: {message}" if code != 75 else message, file=sys.stderr)
        sys.exit(code)


def _check_environment() -> None:
    """Raise InputError for a setting of JAX that changes the results of every program."""
    value = os.environ.get("JAX_ENABLE_X64", "")
    if value.lower() not in ("", "0", "false", "off", "no", "n", "f"):
        raise InputError(f"JAX_ENABLE_X64={value}: 64-bit numbers change the results; expected it to be unset")


# --- Reading the command line ----------------------------------------------------------------------------------------


class IfBare(NamedTuple):
    """Annotates an option that may be given without a value, which means `text`."""

    text: str


class _Given(str):
    """Text from the command line, as opposed to a default."""


class _Default(NamedTuple):
    """The default of an option, for the help."""

    value: Any
    required: bool
    """Whether there is none: neither the file nor the dataclass gives a value."""


@dataclasses.dataclass(frozen=True)
class CommandLine(Generic[T]):
    """A well-formed command line, whose values are still unchecked text."""

    kind: type[T]
    given: Mapping[str, Any]
    """Option -> text, list of texts, or True for a flag; only those on the command line."""

    @property
    def fields(self) -> dict[str, Any]:
        """The given fields of the configuration, such as train.steps."""
        return {name: value for name, value in self.given.items() if "." in name}

    def options(self) -> T:
        """The checked options, with the sections of the configuration.

        Raises:
            InputError: a value is missing or impossible, or the configuration cannot be read.
        """
        own = {name: value for name, value in self.given.items() if "." not in name}
        values = {name: reading.literal(name, value) for name, value in own.items()}
        hints = get_type_hints(self.kind, include_extras=True)
        if "run" in hints:
            file: Any = own.get("config", getattr(self.kind, "config", None))
            values["run"] = config.load(hints["run"], file, self.fields)
        origin = {
            name: f"{'' if _POSITIONAL in _unwrap(hints[name])[1] else '--'}{name}={reading.shown(value)}"
            for name, value in own.items()
        }
        return config.from_plain(self.kind, values, "command line", origin)


def parse(kind: type[T], argv: Sequence[str], prog: str, about: str | None) -> CommandLine[T]:
    """Read a command line with the options of `kind`.

    Args:
        prog: the command, as the help shows it.
        about: the first part of the help.

    Raises:
        InputError: an option is given twice, or `--help` cannot read the configuration.
        SystemExit: `--help` was printed (code 0), or tyro reported a malformed option (code 2).
    """
    file = _find_config(argv) or getattr(kind, "config", None)
    asked = not {"-h", "--help"}.isdisjoint(argv)
    values = reading.read(reading.locate(file)) if file and asked else {}
    parsed = tyro.cli(
        _texts(kind, {"run": values}), args=argv, prog=prog, description=about, use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )  # fmt: skip
    given = _given(parsed)
    names = [token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")]
    for name in given:
        if names.count(name) > 1:
            raise InputError(f"argument --{name} is given twice; expected it once")
    return CommandLine(kind, given)


def _find_config(argv: Sequence[str]) -> str | None:
    for token, following in zip_longest(argv, argv[1:]):
        if token == "--config" or token.startswith("--config="):
            return token.partition("=")[2] or following
    return None


def _texts(kind: Any, values: Mapping[str, Any], sections: bool = False) -> type:
    """A copy of a dataclass of options for tyro: the same names, defaults and help, but all values stay text.

    Args:
        values: field -> the value, or for a dataclass the values, to show as the default.
        sections: whether the fields may come from a file, so that tyro must not require them.
    """
    hints, fields = get_type_hints(kind, include_extras=True), []
    for name, info in kind.__pydantic_fields__.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            copy = _texts(hint, values.get(name, {}), True)
            fields.append((name, Annotated[copy, tyro.conf.arg(name="")] if name == "run" else copy))
        elif hint is bool:
            fields.append((name, Annotated[bool, tyro.conf.arg(help=info.description)], info.default))
        elif info.is_required() and not sections:
            fields.append((name, _text(hint, info.description)))
        else:
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            default = _Default(values.get(name, default), info.is_required() and name not in values)
            fields.append((name, _text(hint, info.description, default), default))
    return dataclasses.make_dataclass(kind.__name__, fields, kw_only=True, namespace={"__doc__": ""})


def _text(hint: Any, about: str | None, default: _Default | None = None) -> Any:
    """The type of a value that tyro takes as text, or as a list of texts where a position takes several."""
    kind, notes = _unwrap(hint)
    several = _POSITIONAL in notes and get_origin(kind) is tuple
    bare = next((note.text for note in notes if isinstance(note, IfBare)), None)

    def read(texts: list[str]) -> Any:
        if several:
            return [_Given(text) for text in texts]
        return _Given(texts[0] if texts else bare)

    spec = PrimitiveConstructorSpec(
        nargs="*" if several else 1 if bare is None else (0, 1),
        metavar=_metavar(kind),
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [reading.shown(value.value)],
    )
    shown = "(required)" if default is None or default.required else f"(default: {reading.shown(default.value)})"
    about = " ".join((about or "").split())  # for tyro to wrap
    positional = [_POSITIONAL] if _POSITIONAL in notes else []
    return Annotated[(Any, spec, *positional, tyro.conf.arg(help=about, help_behavior_hint=shown))]


_POSITIONAL: Any = tyro.conf.Positional


def _unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """A type and its annotations."""
    kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return kind, notes


_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", NoneType: "null"}


def _metavar(hint: Any) -> str:
    """The name of a type in the help, such as INT or PATH|null."""
    hint, _ = _unwrap(hint)
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    if get_origin(hint) is tuple:
        return f"[{_metavar(get_args(hint)[0])}, ...]"
    return _METAVARS.get(hint) or "|".join(map(_metavar, get_args(hint)))


def _given(parsed: Any, prefix: str = "") -> dict[str, Any]:
    """Option -> value for every option on the command line."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        if dataclasses.is_dataclass(value):
            found |= _given(value, "" if field.name == "run" else f"{prefix}{field.name}.")
        elif isinstance(value, _Given | list) or value is True:
            found[f"{prefix}{field.name}"] = value
    return found
