"""What all programs share: bad input is one line on the console and exit code 2."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tfm_jax.errors import InputError, NonFiniteLoss

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line and exit."""
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax and grain tell every step of theirs
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(_tell(str(error), 2))
    except NonFiniteLoss as error:
        sys.exit(_tell(str(error), 1))
    except OSError as error:  # a disk that is full or read-only, a folder that cannot be made
        sys.exit(_tell(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # what writes files below Python has exceptions of its own
        if "No space left on device" not in str(error):
            raise
        sys.exit(_tell("no space left on the device that is written to", 2))


def parser(about: str | None) -> argparse.ArgumentParser:
    """A parser for a program without a configuration file, with what is wrong told in one line."""
    return _Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; --help tells more")


def _tell(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
