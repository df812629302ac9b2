"""Progress messages of a program, on stderr."""

import contextlib
import sys
import time
from collections.abc import Iterator


def log(line: str) -> None:
    """Print a line immediately."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(task: str) -> Iterator[None]:
    """Print the name of a task when it starts, and how many seconds it took if it succeeds."""
    start = time.monotonic()
    log(f"{task} ...")
    yield
    log(f"  {time.monotonic() - start:.1f} s")
