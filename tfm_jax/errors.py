"""The exceptions that a program tells in one line."""


class InputError(ValueError):
    """Bad input: one line that names the file or field, its value and what was expected.

    Every program prints it as it is and exits with code 2; any other exception is a defect of ours and keeps
    its traceback.
    """


class NonFiniteLoss(RuntimeError):
    """Training diverged: the message names the step whose loss was NaN or infinite, and its clips. Exit code 1."""
