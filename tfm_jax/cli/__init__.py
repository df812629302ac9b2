"""The programs. In each module, `main()` is the console command, which runs `execute(argv)`."""

import os
import sys
from types import TracebackType

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # otherwise transformers recommends installing PyTorch


def _report_interrupt(error_type: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report Ctrl-C during the imports of a program in one line instead of with a traceback."""
    if issubclass(error_type, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(error_type, error, traceback)


sys.excepthook = _report_interrupt  # set here, because this file runs before a program imports JAX
