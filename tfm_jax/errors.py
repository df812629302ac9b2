"""The one exception that means: what the user gave is wrong."""


class InputError(ValueError):
    """Bad input: one line that names the file or field, its value and what was expected.

    Every program prints it as it is and exits with code 2; any other exception is a defect of ours and keeps
    its traceback.
    """
