"""What all programs share: bad input is one line on the console and exit code 2."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tfm_jax import errors
from tfm_jax.errors import InputError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line and exit."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax and grain tell every step of theirs
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        told = errors.told(error)
        if told is None:
            raise
        message, code = told
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)


def parser(about: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser for options that are no fields of a configuration, with what is wrong told in one line."""
    return _Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; --help tells more")
