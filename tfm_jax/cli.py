"""What all programs share: one line for bad input, the exit code of every ending, Ctrl-C and SIGTERM."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from tfm_jax import errors, interrupts
from tfm_jax.errors import InputError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # transformers recommends installing PyTorch


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line and exit."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax and grain log each of their steps
    try:
        with interrupts.handled():
            _check_environment()
            main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        described = errors.describe(error)
        if described is None:
            raise
        message, code = described
        print(f"error: {message}" if code != 75 else message, file=sys.stderr)
        sys.exit(code)


def parser(about: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser for options that are no fields of a configuration; its errors are one line."""
    return _Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; --help lists the options")


def _check_environment() -> None:
    """Raise InputError for a setting of JAX that changes the numbers of every program."""
    value = os.environ.get("JAX_ENABLE_X64", "")
    if value.lower() not in ("", "0", "false", "off", "no", "n", "f"):
        raise InputError(f"JAX_ENABLE_X64={value}: 64-bit numbers change the results; expected it to be unset")


def _report_interrupt(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Ctrl-C while a program still imports its libraries: one line instead of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report_interrupt
