"""The metrics of a run: metrics.jsonl records every step, and the console shows some of the steps."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tfm_jax.errors import NonFiniteLoss
from tfm_jax.files import replacing

MAX_CLIPS_SHOWN = 8
"""The console names at most this many clips of a bad step; metrics.jsonl names all of them."""


class Metrics:
    """Writes the report of each step, one step late, so that the devices never wait for the host.

    A line on the console shows the loss and its terms, the gradient norm, the learning rate, the clips per second and
    the remaining time. The last two are measured since the previous line, or since the end of the first step; a line
    for the first step itself omits them.

    `bad_steps` in the report of a step is the number of bad steps in a row up to that step, so the step is bad if the
    number is above 0. If a report has no `bad_steps`, the step is bad if one of its values is not finite.

    Args:
        file: metrics.jsonl; if None, nothing is written or printed, but bad steps are still detected.
        first_step: number of steps already done; an existing file loses its lines about later steps.
        max_bad_steps: number of bad steps in a row that ends the run.
        clip_name: maps the index of a clip to its name.
    """

    def __init__(
        self, file: Path | None, first_step: int, last_step: int, batch_size: int, log_every: int,
        max_bad_steps: int = 1, clip_name: Callable[[int], str] = str,
    ):  # fmt: skip
        self._file = file
        self._last_step = last_step
        self._batch_size = batch_size
        self._log_every = log_every
        self._max_bad_steps = max_bad_steps
        self._clip_name = clip_name
        self._pending: tuple[int, dict[str, Any], Sequence[int]] | None = None
        self._since: tuple[int, float] | None = None
        self._stream = None
        if file is not None:
            _remove_steps_after(file, first_step)
            self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__

    def add(self, step: int, report: dict[str, Any], clips: Sequence[int]) -> None:
        """Accept the report of a step, which the devices may still be computing, and write that of the previous step.

        Raises:
            NonFiniteLoss: the last `max_bad_steps` steps up to the previous one were bad. `flush` can still write the
                new report.
        """
        before, self._pending = self._pending, (step, report, clips)
        if before:
            self._write(*before)

    def flush(self) -> None:
        """Write the last report that `add` accepted.

        Raises:
            NonFiniteLoss: the last `max_bad_steps` steps were bad.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._write(*pending)

    def _write(self, step: int, report: dict[str, Any], clips: Sequence[int]) -> None:
        values = {name: float(report[name]) for name in sorted(report, key=lambda name: name != "loss")}
        bad_steps = int(values.pop("bad_steps", not all(map(math.isfinite, values.values()))))
        if bad_steps:
            self._write_bad(step, values, [self._clip_name(clip) for clip in clips], bad_steps)
        else:
            self._append({"step": step, **values})
            if self._stream and (step % self._log_every == 0 or step == self._last_step):
                self._print(step, values)
        self._since = self._since or (step, time.monotonic())

    def _write_bad(self, step: int, values: dict[str, float], clips: list[str], bad_steps: int) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append({"step": step, **numbers, "skipped": True, "clips": clips})
        reasons = [f"the {name} is {values[name]}" for name, number in numbers.items() if number is None]
        reason = " and ".join(reasons) or "the update is not finite"
        shown = ", ".join(clips[:MAX_CLIPS_SHOWN])
        more = f" and {len(clips) - MAX_CLIPS_SHOWN} more" if len(clips) > MAX_CLIPS_SHOWN else ""
        message = f"{reason}; clips of this step: {shown}{more}"
        if bad_steps >= self._max_bad_steps:
            raise NonFiniteLoss(f"step {step}: {message} (bad steps in a row: {bad_steps})")
        if self._stream:
            print(f"step {step}/{self._last_step}  skipped: {message}", file=sys.stderr, flush=True)

    def _append(self, line: dict[str, Any]) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps(line, allow_nan=False) + "\n")
            self._stream.flush()
        except OSError as error:
            error.filename = str(self._file)
            raise

    def _print(self, step: int, values: dict[str, float]) -> None:
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        line = f"step {step}/{self._last_step}  {numbers}"
        if self._since:
            now = time.monotonic()
            steps, seconds = step - self._since[0], now - self._since[1]
            self._since = (step, now)
            remaining = timedelta(seconds=round((self._last_step - step) * seconds / steps))
            line += f"  {steps * self._batch_size / seconds:.3g} clips/s  ETA {remaining}"
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._stream:
            # A line that could not be written is still in the buffer, and closing the file tries to write it again.
            # A second failure must not replace the first exception.
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                self._stream.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl. Bad steps also have `skipped` and `clips`, and None for non-finite values."""
    with open(file, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _remove_steps_after(file: Path, last: int) -> None:
    """Remove the lines of steps after `last`, which an interrupted run wrote after its last checkpoint."""
    if file.exists():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        with replacing(file) as scratch:
            scratch.write_text("".join(line for line in lines if _step_of(line) <= last), encoding="utf-8")


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity if a crash cut the line off."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
