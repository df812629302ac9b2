"""The numbers of a run: every step in metrics.jsonl, some on the console."""

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

NAMED = 8
"""Clips of a bad step that are named on the console; metrics.jsonl names all of them."""


class Metrics:
    """Writes what each step reports, one step late, so that the devices never wait for the host.

    On the console: loss and its terms, learning rate, gradient norm, clips per second and the time that is left, both
    over the steps since the last line; the clock starts at the end of the first step. A step is bad if one of its
    numbers is not finite, or if its report says `bad_steps`, the number of bad steps in a row up to this one.

    Args:
        file: metrics.jsonl; None writes nothing and only watches for bad steps.
        max_bad_steps: the number of bad steps in a row that ends the run.
        name_of: the name of a clip, by its index.
    """

    def __init__(
        self, file: Path | None, first_step: int, last_step: int, batch_size: int, log_every: int,
        max_bad_steps: int = 1, name_of: Callable[[int], str] = str,
    ):  # fmt: skip
        self._file = file
        self._last_step = last_step
        self._batch_size = batch_size
        self._log_every = log_every
        self._max_bad_steps = max_bad_steps
        self._name_of = name_of
        self._pending: tuple[int, dict[str, Any], Sequence[int]] | None = None
        self._since: tuple[int, float] | None = None
        self._stream = None
        if file is not None:
            _keep_steps(file, first_step)
            self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__

    def add(self, step: int, report: dict[str, Any], clips: Sequence[int]) -> None:
        """Take the report of a step (still being computed) and write that of the step before.

        Raises:
            NonFiniteLoss: the step before was the last of `max_bad_steps` bad steps in a row. The report is kept.
        """
        before, self._pending = self._pending, (step, report, clips)
        if before:
            self._write(*before)

    def flush(self) -> None:
        """Write the report that was taken last. Raises as `add` does."""
        if self._pending is not None:
            last, self._pending = self._pending, None
            self._write(*last)

    def _write(self, step: int, report: dict[str, Any], clips: Sequence[int]) -> None:
        values = {name: float(report[name]) for name in sorted(report, key=lambda name: name != "loss")}
        bad_steps = int(values.pop("bad_steps", not all(map(math.isfinite, values.values()))))
        if bad_steps:
            self._write_bad(step, values, [self._name_of(clip) for clip in clips], bad_steps)
        else:
            self._append({"step": step, **values})
            if self._stream and (step % self._log_every == 0 or step == self._last_step):
                self._print(step, values)
        self._since = self._since or (step, time.monotonic())

    def _write_bad(self, step: int, values: dict[str, float], clips: list[str], bad_steps: int) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append({"step": step, **numbers, "skipped": True, "clips": clips})
        wrong = [f"the {name} is {values[name]}" for name, number in numbers.items() if number is None]
        more = f" and {len(clips) - NAMED} more" if len(clips) > NAMED else ""
        what = (
            f"{' and '.join(wrong) or 'the update is not finite'}; clips of this step: {', '.join(clips[:NAMED])}{more}"
        )
        if bad_steps >= self._max_bad_steps:
            raise NonFiniteLoss(f"step {step}: {what} (bad steps in a row: {bad_steps})")
        if self._stream:
            print(f"step {step}/{self._last_step}  skipped: {what}", file=sys.stderr, flush=True)

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
            left = timedelta(seconds=round((self._last_step - step) * seconds / steps))
            line += f"  {steps * self._batch_size / seconds:.3g} clips/s  ETA {left}"
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._stream:
            # A line that could not be written is still in the buffer, and closing tries to write it once more.
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                self._stream.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. That of a bad step has `skipped`, its clips, and None for what was not finite."""
    with open(file, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _keep_steps(file: Path, last: int) -> None:
    """Drop what a run that was cut off wrote after its last checkpoint."""
    if file.exists():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        with replacing(file) as scratch:
            scratch.write_text("".join(line for line in lines if _step_of(line) <= last), encoding="utf-8")


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a crash cut off."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
