"""The time and memory of a child process, on Linux."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """Time and memory of a child process."""

    seconds: float
    peak_memory: int
    """Peak of RssAnon in bytes, which does not include the pages of mapped files."""


def run_and_watch(command: Sequence[str], interval: float = 0.05) -> Usage:
    """Run a program, and read its memory use every `interval` seconds.

    Raises:
        CalledProcessError: the program failed.
    """
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(interval)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(time.monotonic() - start, peak)


def anonymous_memory(pid: int) -> int:
    """Return RssAnon of a process in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except ProcessLookupError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)
