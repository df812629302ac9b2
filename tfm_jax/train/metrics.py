"""The numbers of a run: every step in metrics.jsonl, some on the console."""

import json
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tfm_jax.errors import NonFiniteLoss


class Metrics:
    """Writes what each step reports, one step late, so that the devices never wait for the host.

    On the console: loss and its terms, learning rate, gradient norm, clips a second and the time that is left, both
    over the steps since the last line. Without a `file` it writes nothing and only watches for numbers that are not
    finite.
    """

    def __init__(self, file: Path | None, first_step: int, last_step: int, batch_size: int, log_every: int):
        self._last_step = last_step
        self._batch_size = batch_size
        self._log_every = log_every
        self._pending: tuple[int, dict[str, Any], list[int]] | None = None
        self._since = (first_step, time.monotonic())
        self._stream = None
        if file is not None:
            _keep_steps(file, first_step)
            self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__

    def add(self, step: int, report: dict[str, Any], clips: list[int]) -> None:
        """Take the report of a step (still being computed) and write that of the step before.

        Raises:
            NonFiniteLoss: the step before had one, or another number that is not finite.
        """
        self.flush()
        self._pending = (step, report, clips)

    def flush(self) -> None:
        """Write the report that was taken last. Raises as `add` does."""
        if self._pending is None:
            return
        (step, report, clips), self._pending = self._pending, None
        values = {name: float(report[name]) for name in sorted(report, key=lambda name: name != "loss")}
        if self._stream:
            self._stream.write(json.dumps({"step": step, **values}) + "\n")
            self._stream.flush()
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteLoss(f"step {step}: the {name} is {value}; clips of this step: {clips}")
        if self._stream and (step % self._log_every == 0 or step == self._last_step):
            self._print(step, values)

    def _print(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        steps, seconds = step - self._since[0], now - self._since[1]
        self._since = (step, now)
        left = timedelta(seconds=round((self._last_step - step) * seconds / steps))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        speed = f"{steps * self._batch_size / seconds:.3g} clips/s"
        print(f"step {step}/{self._last_step}  {numbers}  {speed}  ETA {left}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream:
            self._stream.close()


def read_metrics(file: Path) -> list[dict[str, float | int]]:
    """The lines of a metrics.jsonl."""
    with open(file, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _keep_steps(file: Path, last: int) -> None:
    """Drop what a run that was cut off wrote after its last checkpoint."""
    if file.exists():
        lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        file.write_text("".join(line for line in lines if json.loads(line)["step"] <= last), encoding="utf-8")
