"""What all programs share: bad input is one line on the console and exit code 2."""

import logging
import sys
from collections.abc import Callable, Sequence

from tfm_jax.errors import InputError


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line and exit."""
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax and grain tell every step of theirs
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(_refuse(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
