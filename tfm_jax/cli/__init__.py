"""The programs. Each module has a `main()` for its console command and an `execute(argv)` that it runs."""

import os
import sys
from types import TracebackType

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # transformers recommends installing PyTorch


def _report_interrupt(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report Ctrl-C during the imports of a program in one line instead of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report_interrupt  # here, because this file runs before a program imports JAX
