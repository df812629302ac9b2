"""The exceptions that a program reports in one line, and the exit code of each."""

FAILED_WRITES = ("No space left on device", "Read-only file system", "File too large", "Disk quota exceeded")
"""The operating system's messages about failed writes. Libraries wrap them in exceptions of any type."""


class InputError(ValueError):
    """The input is invalid. The message is one line: the file or field, its value, and what was expected. Exit code 2.

    An exception that this module does not describe is a bug in this package and keeps its traceback.
    """


class NonFiniteLoss(RuntimeError):
    """Training diverged: losses, gradients, updates or adapters are not finite. The message names the step or the run.

    Exit code 1.
    """


class CompilerError(RuntimeError):
    """The compiler failed for a reason other than a lack of device memory. Exit code 3."""


class StoppedEarly(Exception):
    """Ctrl-C or SIGTERM stopped the program after it had saved its work, so that it can be continued. Exit code 75."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the program before it could save its work. Exit code 143, with which shells report SIGTERM."""


def describe(error: BaseException) -> tuple[str, int] | None:
    """Return the line to print for an exception, and the exit code; None if the exception is a bug in this package."""
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
    elif isinstance(error, OSError):  # such as a full or read-only disk
        message, code = f"{error.filename}: {error.strerror}" if error.filename else str(error), 2
    elif failure := failed_write(error):
        message, code = f"writing failed: {failure}", 2
    else:
        return None
    return " ".join(message.split()), code


def failed_write(error: BaseException) -> str | None:
    """Return the message about a failed write that the text of an exception contains; None if it contains none."""
    return next((failure for failure in FAILED_WRITES if failure in str(error)), None)
