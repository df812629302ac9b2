"""Read the files of a run that its training may still be writing.

A program that is killed while it writes, or is read while it writes, leaves a line that is cut off. Such a line is
skipped, because the rest of the file is worth showing; a note on the page says so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tfm_jax import plain_yaml
from tfm_jax.errors import InputError

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
VALIDATION = "validation.jsonl"
EVENTS = "events.jsonl"
ENVIRONMENT = "environment.json"

Record = dict[str, Any]
"""A JSON object."""


class Records(NamedTuple):
    """The contents of the files of a run."""

    settings: Mapping[str, Mapping[str, Any]]
    """The sections of config.yaml."""
    metrics: list[Record]
    """A record for every step in ascending order."""
    validation: list[Record]
    """A record for every evaluation, in ascending order of steps."""
    events: list[Record]
    environment: Record
    notes: list[str]
    """What could not be read."""


def check_run(folder: Path) -> None:
    """Raise InputError unless `folder` is the folder of a training run."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the folder of a training run (its train.output)")
    for name in (CONFIG, METRICS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: contains no {name}; expected the folder of a training run (its train.output)")


def record_files(folder: Path) -> list[Path]:
    """Return the paths that `read_records` reads. All but config.yaml and metrics.jsonl may be missing."""
    return [folder / name for name in (CONFIG, METRICS, VALIDATION, EVENTS, ENVIRONMENT)]


def read_records(folder: Path) -> Records:
    """Read the files of a run, of which only the samples are missing.

    A run that is resumed may repeat steps; the last record of a step counts.

    Raises:
        InputError: `folder` is not the folder of a run, or its config.yaml contains no sections.
    """
    check_run(folder)
    notes: list[str] = []
    metrics = {line["step"]: line for line in _read_lines(folder / METRICS, notes)}
    validation = {(line["step"], str(line.get("model"))): line for line in _read_lines(folder / VALIDATION, notes)}
    return Records(
        settings=_read_settings(folder / CONFIG),
        metrics=[metrics[step] for step in sorted(metrics)],
        validation=[validation[key] for key in sorted(validation)],
        events=_read_lines(folder / EVENTS, notes),
        environment=_read_environment(folder / ENVIRONMENT, notes),
        notes=notes,
    )


def _read_settings(file: Path) -> Mapping[str, Mapping[str, Any]]:
    values = plain_yaml.read(file)
    if not isinstance(values, dict) or not all(isinstance(section, dict) for section in values.values()):
        raise InputError(f"{file}: expected sections with fields, as tfm-train writes them")
    return values


def _read_environment(file: Path, notes: list[str]) -> Record:
    if not file.is_file():
        return {}
    record = _parse(file.read_bytes())
    if record is None:
        notes.append(f"{file.name} could not be read: it is not a complete JSON object.")
    return record or {}


def _read_lines(file: Path, notes: list[str]) -> list[Record]:
    """Return the records with a step in a JSONL file, or none if there is no file."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    records = [_parse(line) for line in lines]
    good = [record for record in records if record is not None and _is_whole(record.get("step"))]
    if len(good) < len(lines):
        count = len(lines) - len(good)
        which = "1 line is" if count == 1 else f"{count} lines are"
        notes.append(f"{file.name}: {which} left out, because a line that is cut off or damaged cannot be read.")
    return good


def _parse(text: bytes) -> Record | None:
    """Parse a JSON object; return None if the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
