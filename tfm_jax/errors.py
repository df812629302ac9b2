"""The exceptions that a program tells in one line."""


class InputError(ValueError):
    """Bad input: one line that names the file or field, its value and what was expected.

    Every program prints it as it is and exits with code 2; any other exception is a defect of ours and keeps
    its traceback.
    """


class NonFiniteLoss(RuntimeError):
    """Training diverged: the message names the step whose loss was NaN or infinite, and its clips. Exit code 1."""


class CompilerError(RuntimeError):
    """The compiler gave up on a program, for another reason than the memory of the device. Exit code 3."""


def told(error: BaseException) -> tuple[str, int] | None:
    """What a program says of an exception in one line, and its exit code; None for a defect of ours."""
    if isinstance(error, InputError):
        message, code = str(error), 2
    elif isinstance(error, NonFiniteLoss):
        message, code = str(error), 1
    elif isinstance(error, CompilerError):
        message, code = str(error), 3
    elif isinstance(error, OSError):  # a disk that is full or read-only, a folder that cannot be made
        message, code = f"{error.filename}: {error.strerror}" if error.filename else str(error), 2
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", 130
    elif "No space left on device" in str(error):  # what writes files below Python has exceptions of its own
        message, code = "no space left on the device that is written to", 2
    else:
        return None
    return " ".join(message.split()), code
