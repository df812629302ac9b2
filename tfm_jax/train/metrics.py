"""The files of a run that record what happened, and its lines on the console."""

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from tfm_jax.console import log
from tfm_jax.files import replacing
from tfm_jax.train.watching import About, Event, Watcher

PACKAGES = ("tfm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")
"""The packages whose versions environment.json records, if they are installed."""


class JsonLines:
    """A file with one JSON object per line, to which lines are appended. Numbers that are not finite become null.

    Args:
        last_step: an existing file loses its lines about later steps, which an interrupted run wrote after its last
            checkpoint; None keeps all lines.
    """

    def __init__(self, file: Path, last_step: int | None = None):
        self._file = file
        if last_step is not None and file.exists():
            kept = lines_up_to(file, last_step)
            with replacing(file) as scratch:
                scratch.write_text("".join(kept), encoding="utf-8")
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(file, "a", encoding="utf-8")  # noqa: SIM115, closed by `close`

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line, so that others see it at once."""
        try:
            self._stream.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self._stream.flush()
        except OSError as error:
            error.filename = str(self._file)
            raise

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile(Watcher):
    """Records every step in metrics.jsonl. Bad steps also have `skipped` and the names of their `clips`.

    Args:
        file: another file than metrics.jsonl in the folder of the run.
    """

    def __init__(self, file: Path | None = None):
        self._file = file
        self._lines: Any = None

    def open(self, about: About) -> None:
        self._lines = JsonLines(self._file or about.output / "metrics.jsonl", about.first)

    def on_event(self, event: Event) -> None:
        if event.kind == "step":
            self._lines.append({"step": event.step, **event.values})
        elif event.kind == "skipped":
            values = {name: value for name, value in event.values.items() if name not in ("clips", "reason")}
            self._lines.append({"step": event.step, **values, "skipped": True, "clips": event.values["clips"]})

    def close(self) -> None:
        self._lines.close()


class Console(Watcher):
    """Prints some of the steps, and every evaluation.

    The line of a step shows the loss and its terms, the gradient norm, the learning rate, the clips per second, the
    model FLOP/s utilisation where it is known, and the remaining time. Speed and time are measured since the previous
    line, or since the end of the first step; a line for the first step itself omits them.

    Args:
        log_every: number of steps between the lines.
    """

    HIDDEN = ("update_norm", "loss_by_level", "seconds", "clips_per_second", "data_wait", "tflops", "mfu",
              "memory_bytes")  # fmt: skip
    """Values of a step that are only in metrics.jsonl."""

    def __init__(self, log_every: int):
        self._log_every = log_every
        self._since: tuple[int, float] | None = None

    def open(self, about: About) -> None:
        self._about = about

    def on_event(self, event: Event) -> None:
        if event.kind == "step":
            if event.step % self._log_every == 0 or event.step == self._about.last:
                log(self._describe(event))
        elif event.kind == "skipped":
            log(f"step {event.step}/{self._about.last}  skipped: {event.values['reason']}")
        elif event.kind == "validation":
            losses = "  ".join(f"{name} {loss:.4g}" for name, loss in event.values["loss"].items())
            what = "the base" if event.values["model"] == "base" else f"step {event.step}"
            log(f"validation of {what}  {losses}  ({event.values['clips']} clips)")
        elif event.kind == "samples":
            log(f"samples of step {event.step}: {event.values['folder']}")
        if event.kind in ("step", "skipped"):
            self._since = self._since or (event.step, time.monotonic())

    def _describe(self, event: Event) -> str:
        step, last = event.step, self._about.last
        numbers = {name: value for name, value in event.values.items() if name not in self.HIDDEN}
        line = f"step {step}/{last}  " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._since:
            now = time.monotonic()
            steps, seconds = step - self._since[0], now - self._since[1]
            self._since = (step, now)
            remaining = timedelta(seconds=round((last - step) * seconds / steps))
            line += f"  {steps * self._about.clips_per_step / seconds:.3g} clips/s"
            if "mfu" in event.values:
                line += f"  MFU {event.values['mfu']:.1%}"
            line += f"  ETA {remaining}"
        return line


class EventLog(Watcher):
    """Records in events.jsonl when a run started, stopped and saved checkpoints, and in environment.json where.

    The lines of a start also have `steps`, the number of steps of the whole run.
    """

    KINDS = ("started", "resumed", "checkpoint", "skipped", "stopped", "finished")

    def __init__(self) -> None:
        self._lines: Any = None

    def open(self, about: About) -> None:
        self._steps = about.last
        self._lines = JsonLines(about.output / "events.jsonl")
        with replacing(about.output / "environment.json") as scratch:
            scratch.write_text(json.dumps(_environment(about), indent=1) + "\n", encoding="utf-8")

    def on_event(self, event: Event) -> None:
        if event.kind in self.KINDS:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            detail = event.values.get("reason", "")
            steps = {"steps": self._steps} if event.kind in ("started", "resumed") else {}
            self._lines.append({"time": now, "step": event.step, "event": event.kind, "detail": detail, **steps})

    def close(self) -> None:
        self._lines.close()


def _environment(about: About) -> dict[str, Any]:
    devices = jax.devices()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "command": sys.argv,
        "versions": versions,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "processes": jax.process_count(),
        "devices": {"count": len(devices), "kind": devices[0].device_kind, "platform": devices[0].platform},
        "mesh": dict(about.mesh.shape) if about.mesh else {},
    }


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl. Bad steps also have `skipped` and `clips`, and None for non-finite values."""
    with open(file, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def lines_up_to(file: Path, last_step: int) -> list[str]:
    """Return the complete lines about steps up to `last_step`; none if there is no file."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if _step_of(line) <= last_step]


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity if a crash cut the line off."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
