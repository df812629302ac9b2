"""Handle Ctrl-C and SIGTERM.

The first signal raises an exception in the main thread (KeyboardInterrupt or `Terminated`), so that `finally` blocks
clean up. Inside `postponed`, the first signal is only recorded; the program then saves its work and stops at the next
safe point. A second signal always ends the process at once, even if the main thread is waiting for a device or for the
compiler.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

from tfm_jax.errors import Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_plan: str | None = None
"""What the program does after the first signal, if inside `postponed`; None if the signal raises an exception."""

_requested: str | None = None
"""The name of the recorded signal."""


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle both signals inside the block. Outside the main thread, do nothing: Python allows no handlers there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    # Python runs handlers in the main thread, which may be in a long call. The listening thread gets signals at once.
    threading.Thread(target=_listen, args=(receiver,), daemon=True).start()
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    # Shells start background programs with Ctrl-C ignored; keep ignoring it.
    handled_signals = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, _raise) for number in handled_signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        sender.close()


@contextlib.contextmanager
def postponed(plan: str) -> Iterator[None]:
    """Inside the block, record the first signal for `requested` instead of raising an exception.

    Args:
        plan: what the program does after the signal, such as "saving a checkpoint after this step"; it is printed.
    """
    global _plan, _requested
    _plan, _requested = plan, None
    try:
        yield
    finally:
        _plan = None


def requested() -> str | None:
    """Return the name of the signal that was recorded inside `postponed`, SIGINT or SIGTERM; None if there was none."""
    return _requested


def _raise(number: int, frame: FrameType | None) -> None:
    del frame
    if _plan is None:
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _listen(receiver: socket.socket) -> None:
    """Record the first signal if inside `postponed`, and end the process at the second. This runs in its own thread."""
    global _requested
    count = 0
    with receiver:
        while data := receiver.recv(1):
            if data[0] not in SIGNALS:
                continue
            count += 1
            if count > 1:
                os._exit(128 + data[0])
            if _plan is not None:
                _requested = signal.Signals(data[0]).name
                os.write(2, f"{_requested}: {_plan}; send it again to end the program at once\n".encode())
