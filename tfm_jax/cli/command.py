"""What all programs share: the command line, errors in one line, exit codes, Ctrl-C and SIGTERM.

A program declares its options as a dataclass. If the dataclass has a field `run`, this field holds the sections of a
configuration. Their fields become options such as `--train.steps`; the defaults of these options are the values in the
file that `--config` names. tyro reads the command line and prints the help. pydantic then checks the values of the file
and of the options together.
"""

import contextlib
import dataclasses
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from tfm_jax import config, errors, interrupts
from tfm_jax.config import reading
from tfm_jax.errors import InputError

T = TypeVar("T")


# --- Running a program -----------------------------------------------------------------------------------------------


def run(execute: Callable[[Sequence[str]], None]) -> None:
    """Call `execute` with the command-line arguments. If it fails, report the error and exit with the error's code."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and Grain log every step
    with _closed_pipe_ends_quietly():
        try:
            with interrupts.handled():
                _check_environment()
                execute(sys.argv[1:])
        except BrokenPipeError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            described = errors.describe(error)
            if described is None:
                raise
            message, code = described
            print(f"error: {message}" if code != 75 else message, file=sys.stderr)
            sys.exit(code)


@contextlib.contextmanager
def _closed_pipe_ends_quietly() -> Iterator[None]:
    """If nobody reads the output to its end, as in `tfm-lora inspect FILE | head`, exit without a message.

    The exit code is 141, with which shells report SIGPIPE.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # the rest of the output, also of --help
    except BrokenPipeError:
        # Python flushes both streams again when it exits, which must not fail.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(141)


def _check_environment() -> None:
    """Raise InputError if an environment variable makes JAX compute with 64-bit numbers."""
    value = os.environ.get("JAX_ENABLE_X64", "")
    if value.lower() not in ("", "0", "false", "off", "no", "n", "f"):
        raise InputError(f"JAX_ENABLE_X64={value}: 64-bit numbers would change the results; unset this variable")


# --- Reading the command line ----------------------------------------------------------------------------------------


class ValueIfOmitted(NamedTuple):
    """Marks an option whose value may be omitted; the value is then `text`."""

    text: str


class _Given(str):
    """A string from the command line, as opposed to a default."""


class _Default(NamedTuple):
    """The default of an option, to show in the help."""

    value: Any
    required: bool
    """True if there is no default, either in the file or in the dataclass."""


@dataclasses.dataclass(frozen=True)
class CommandLine(Generic[T]):
    """A command line that is well-formed, but whose values are unchecked strings."""

    options_type: type[T]
    given: Mapping[str, Any]
    """Option -> its string, its list of strings, or True for a flag. Only options on the command line are included."""

    @property
    def fields(self) -> dict[str, Any]:
        """The options that set fields of the configuration, such as train.steps."""
        return {name: value for name, value in self.given.items() if "." in name}

    def options(self) -> T:
        """Check and return the options, with the sections of the configuration in `run`.

        Raises:
            InputError: a value is missing or impossible, or the configuration cannot be read.
        """
        own = {name: value for name, value in self.given.items() if "." not in name}
        values = {name: reading.literal(name, value) for name, value in own.items()}
        hints = get_type_hints(self.options_type, include_extras=True)
        if "run" in hints:
            file: Any = own.get("config", getattr(self.options_type, "config", None))
            values["run"] = config.load(hints["run"], file, self.fields)
        origin = {
            name: f"{'' if _POSITIONAL in _unwrap(hints[name])[1] else '--'}{name}={reading.shown(value)}"
            for name, value in own.items()
        }
        return config.from_plain(self.options_type, values, "command line", origin)


def parse(options_type: type[T], argv: Sequence[str], prog: str, about: str | None) -> CommandLine[T]:
    """Read a command line whose options are the fields of a dataclass.

    Args:
        options_type: the dataclass.
        prog: the name of the command in the help.
        about: the text at the start of the help.

    Raises:
        InputError: an option is given more than once, or the configuration cannot be read for `--help`.
        SystemExit: `--help` was printed (code 0), or tyro reported a malformed option (code 2).
    """
    file = _find_config(argv) or getattr(options_type, "config", None)
    asked = not {"-h", "--help"}.isdisjoint(argv)
    values = reading.read(reading.locate(file)) if file and asked else {}
    parsed = _read(_text_dataclass(options_type, {"run": values}), argv, prog, about)
    return CommandLine(options_type, _unrepeated(_given(parsed), argv))


def parse_subcommand(commands: Mapping[str, type], argv: Sequence[str], prog: str, about: str | None) -> CommandLine:
    """Like `parse`, for a program whose first argument is one of `commands`, each of which has its own options.

    Args:
        commands: name -> dataclass of the options; its docstring is the help of the command.
    """
    texts = {name: _text_dataclass(kind, {}) for name, kind in commands.items()}
    choices = [
        Annotated[text, tyro.conf.subcommand(name, description=inspect.getdoc(commands[name]))]
        for name, text in texts.items()
    ]
    parsed = _read(Union[tuple(choices)], argv, prog, about)  # noqa: UP007, X | Y takes no list of types
    kind = next(commands[name] for name, text in texts.items() if isinstance(parsed, text))
    return CommandLine(kind, _unrepeated(_given(parsed), argv))


def _read(form: Any, argv: Sequence[str], prog: str, about: str | None) -> Any:
    return tyro.cli(
        form, args=argv, prog=prog, description=about, use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )  # fmt: skip


def _unrepeated(given: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    names = [token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")]
    for name in given:
        if names.count(name) > 1:
            raise InputError(f"--{name} is given more than once")
    return given


def _find_config(argv: Sequence[str]) -> str | None:
    for token, following in zip_longest(argv, argv[1:]):
        if token == "--config" or token.startswith("--config="):
            return token.partition("=")[2] or following
    return None


def _text_dataclass(options_type: Any, values: Mapping[str, Any], from_file: bool = False) -> type:
    """Copy a dataclass of options for tyro: the same names, defaults and help, but the values stay texts.

    Args:
        values: the default to show for each field; a nested mapping for a section.
        from_file: whether the fields may also come from a file, so that tyro must not require them.
    """
    hints, fields = get_type_hints(options_type, include_extras=True), []
    for name, info in options_type.__pydantic_fields__.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            copy = _text_dataclass(hint, values.get(name, {}), True)
            # Without a help text, tyro would search the source code for one, which takes most of the time of parsing.
            fields.append((name, Annotated[copy, tyro.conf.arg(name="" if name == "run" else None, help="")]))
        elif hint is bool and not from_file:  # a flag; a field of a section is set as in the file
            fields.append((name, Annotated[bool, tyro.conf.arg(help=info.description)], info.default))
        elif info.is_required() and not from_file:
            fields.append((name, _text_type(hint, info.description)))
        else:
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            default = _Default(values.get(name, default), info.is_required() and name not in values)
            fields.append((name, _text_type(hint, info.description, default), default))
    return dataclasses.make_dataclass(options_type.__name__, fields, kw_only=True, namespace={"__doc__": ""})


def _text_type(hint: Any, about: str | None, default: _Default | None = None) -> Any:
    """Return a type that makes tyro keep the value of an option as a string, or as a list of strings for a positional
    argument that takes several values."""
    bare_hint, notes = _unwrap(hint)
    several = _POSITIONAL in notes and get_origin(bare_hint) is tuple
    if_omitted = next((note.text for note in notes if isinstance(note, ValueIfOmitted)), None)

    def read(texts: list[str]) -> Any:
        if several:
            return [_Given(text) for text in texts]
        return _Given(texts[0] if texts else if_omitted)

    spec = PrimitiveConstructorSpec(
        nargs="*" if several else 1 if if_omitted is None else (0, 1),
        metavar=_metavar(bare_hint),
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [reading.shown(value.value)],
    )
    shown = "(required)" if default is None or default.required else f"(default: {reading.shown(default.value)})"
    about = " ".join((about or "").split())  # tyro wraps the text
    positional = [_POSITIONAL] if _POSITIONAL in notes else []
    return Annotated[(Any, spec, *positional, tyro.conf.arg(help=about, help_behavior_hint=shown))]


_POSITIONAL: Any = tyro.conf.Positional


def _unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """Split a type into the bare type and its annotations."""
    bare_hint, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return bare_hint, notes


_METAVARS = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", NoneType: "null"}


def _metavar(hint: Any) -> str:
    """Return the name of a type in the help, such as INT or PATH|null."""
    hint, _ = _unwrap(hint)
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    if get_origin(hint) is tuple:
        return f"[{_metavar(get_args(hint)[0])}, ...]"
    if get_origin(hint) is dict:
        return f"{{{': '.join(map(_metavar, get_args(hint)))}, ...}}"
    return _METAVARS.get(hint) or "|".join(map(_metavar, get_args(hint)))


def _given(parsed: Any, prefix: str = "") -> dict[str, Any]:
    """Map the name of every option on the command line to its value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        if dataclasses.is_dataclass(value):
            found |= _given(value, "" if field.name == "run" else f"{prefix}{field.name}.")
        elif isinstance(value, _Given | list) or value is True:
            found[f"{prefix}{field.name}"] = value
    return found
