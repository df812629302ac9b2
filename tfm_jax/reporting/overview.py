"""The words of the page: how far the run is, what happened in it, its settings and its environment."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tfm_jax.config.reading import shown
from tfm_jax.reporting import series
from tfm_jax.reporting.records import METRICS, Record, Records

RECENT = 50
"""The summary shows means over this many of the last steps."""

STATES = {"started": "unfinished", "resumed": "unfinished", "stopped": "stopped", "finished": "finished"}
"""Event -> the state of the run after it. Other events, such as checkpoint, leave the state as it is."""

MAX_SKIPPED = 100
"""The page lists at most this many skipped steps."""


def build_overview(folder: Path, records: Records) -> dict[str, Any]:
    """Return the title, the state, the summary, the notes, and the tables of events, skipped steps and settings."""
    skipped = [record for record in records.metrics if record.get("skipped")]
    state = _state(records)
    notes = list(records.notes)
    if not records.metrics:
        notes.append("No step is finished yet. The first one comes after the program has been compiled.")
    if len(skipped) > MAX_SKIPPED:
        notes.append(f"{len(skipped)} steps were skipped; the table shows the last {MAX_SKIPPED}.")
    return {
        "name": folder.resolve().name,
        "state": state,
        "summary": _summary(records, state),
        "updated": f"{datetime.fromtimestamp((folder / METRICS).stat().st_mtime):%Y-%m-%d %H:%M:%S}",
        "notes": notes,
        "resumed": [event["step"] for event in records.events if event.get("event") == "resumed"],
        "skipped": [record["step"] for record in skipped],
        "skipped_table": [[str(record["step"]), _clips(record)] for record in skipped[-MAX_SKIPPED:]],
        "events": [
            [str(event.get(name, "")) for name in ("time", "step", "event", "detail")] for event in records.events
        ],
        "settings": {
            section: [[name, shown(value)] for name, value in fields.items()]
            for section, fields in records.settings.items()
        },
        "environment": _environment(records.environment),
    }


def _state(records: Records) -> str:
    """Return the state of the run in a word.

    A run that was killed leaves no event, so the files cannot tell it from one that is in progress.
    """
    total = _total_steps(records)
    if total is not None and _last_step(records) >= total:
        return "finished"
    events = [str(event.get("event")) for event in records.events]
    states = [STATES[event] for event in events if event in STATES]
    return states[-1] if states else "unfinished"


def _summary(records: Records, state: str) -> list[str]:
    """Return the parts of the line at the top of the page: steps, loss, speed and remaining time."""
    total, done = _total_steps(records), _last_step(records)
    parts = [f"step {done:,} of {total:,}" if total else f"step {done:,}"]
    recent = [record for record in records.metrics if not record.get("skipped")][-RECENT:]
    if (loss := _recent_mean(recent, "loss")) is not None:
        parts.append(f"loss {loss:.4g} (mean of the last {len(recent)} steps)")
    if (speed := _recent_mean(recent, "clips_per_second")) is not None:
        parts.append(f"{speed:.3g} clips per second")
    if (seconds := _recent_mean(recent, "seconds")) is not None:
        parts.append(f"{seconds:.3g} s per step")
        if total and state == "unfinished":
            parts.append(f"{timedelta(seconds=round((total - done) * seconds))} left at this speed")
    skipped = sum(bool(record.get("skipped")) for record in records.metrics)
    if skipped:
        parts.append(f"{skipped:,} skipped step{'s' if skipped > 1 else ''}")
    return parts


def _total_steps(records: Records) -> int | None:
    """Return the number of steps of the whole run, as of its last start; None if it is not recorded."""
    steps = [event["steps"] for event in records.events if isinstance(event.get("steps"), int)]
    return steps[-1] if steps else None


def _last_step(records: Records) -> int:
    return records.metrics[-1]["step"] if records.metrics else 0


def _recent_mean(recent: Sequence[Record], name: str) -> float | None:
    values = series.column(recent, name)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _clips(record: Record) -> str:
    clips = record.get("clips")
    return ", ".join(map(str, clips)) if isinstance(clips, list) else ""


def _environment(environment: Record) -> list[list[str]]:
    """Return the name and the text of every value, such as `versions.jax`."""
    rows = []
    for name, value in environment.items():
        parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        rows += [[name, part if isinstance(part, str) else json.dumps(part)] for name, part in parts.items()]
    return rows
