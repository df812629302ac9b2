"""The exceptions that a program reports in one line, and the exit code of each."""

FAILED_WRITES = ("No space left on device", "Read-only file system", "File too large", "Disk quota exceeded")
"""Failures of a disk as the operating system words them: libraries that write files report them in exceptions of any
type."""


class InputError(ValueError):
    """Bad input: one line that names the file or field, its value and what was expected. Exit code 2.

    Any exception that is not described here is a bug in this package and keeps its traceback.
    """


class NonFiniteLoss(RuntimeError):
    """Training diverged: the message names the step whose loss was NaN or infinite, and its clips. Exit code 1."""


class CompilerError(RuntimeError):
    """The compiler failed on a program for a reason other than device memory. Exit code 3."""


class StoppedEarly(Exception):
    """Ctrl-C or SIGTERM stopped the program; its finished work is kept and the same command continues. Exit code 75."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ended a program that has nothing to continue from. Exit code 143, as a shell reports it."""


def describe(error: BaseException) -> tuple[str, int] | None:
    """The one line that a program prints for an exception, and its exit code; None for a bug in this package."""
    if isinstance(error, InputError):
        message, code = str(error), 2
    elif isinstance(error, NonFiniteLoss):
        message, code = str(error), 1
    elif isinstance(error, CompilerError):
        message, code = str(error), 3
    elif isinstance(error, StoppedEarly):
        message, code = str(error), 75
    elif isinstance(error, Terminated):
        message, code = "ended by SIGTERM", 143
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", 130
    elif isinstance(error, OSError):  # a full or read-only disk, a folder that cannot be made
        message, code = f"{error.filename}: {error.strerror}" if error.filename else str(error), 2
    elif failure := failed_write(error):
        message, code = f"writing failed: {failure}", 2
    else:
        return None
    return " ".join(message.split()), code


def failed_write(error: BaseException) -> str | None:
    """What is wrong with the disk, where the text of an exception says that writing to it failed."""
    return next((failure for failure in FAILED_WRITES if failure in str(error)), None)
