"""The results of a study: one JSON object per line, appended when a part is done, so an interrupted study can continue.

Several processes may work on one study. Each of them writes only while it holds the lock of the file.
"""

import json
import os
from pathlib import Path
from typing import Any

from tfm_jax.errors import InputError
from tfm_jax.files import lock

Record = dict[str, Any]


class Results:
    """The results measured so far. The first line holds the settings, which cannot change when the study continues.

    Raises:
        InputError: the file belongs to a study with other settings, or does not contain the results of a study.
    """

    def __init__(self, file: Path, settings: Record):
        self.file = file
        with lock(file, wait=True):
            self.records = _read(file)
            if not self.records:
                self._append({"kind": "settings", **settings})
        for name, value in settings.items():
            before = self.one("settings").get(name)
            if before != value:
                raise InputError(f"{file}: a study with {_difference(name, before, value)}; choose another --output")

    def add(self, kind: str, **values: Any) -> Record:
        """Append a record."""
        record = {"kind": kind, **values}
        with lock(self.file, wait=True):
            self._append(record)
        return record

    def _append(self, record: Record) -> None:
        """Requires the lock. Removes the last line if a killed process wrote only part of it."""
        os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.records.append(record)

    def reload(self) -> None:
        """Read the records that other processes have added."""
        self.records = _read(self.file)

    def all(self, kind: str, **values: Any) -> list[Record]:
        """Return all records of this kind with these values."""
        return [r for r in self.records if r["kind"] == kind and all(r.get(n) == v for n, v in values.items())]

    def one(self, kind: str, **values: Any) -> Record:
        """Return the first such record; empty if there is none."""
        found = self.all(kind, **values)
        return found[0] if found else {}


def _read(file: Path) -> list[Record]:
    """Read all records, except an incomplete last line."""
    *lines, _ = file.read_bytes().split(b"\n")
    try:
        records = [json.loads(line) for line in lines]
        kinds = [record["kind"] for record in records]
        if kinds and kinds[0] != "settings":
            raise ValueError("no settings in the first line")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: not the results of a study ({error}); choose another --output") from None
    return records


def _difference(name: str, before: Any, now: Any) -> str:
    """Describe the field in which two settings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        field = next(field for field in sorted(before.keys() | now.keys()) if before.get(field) != now.get(field))
        return _difference(f"{name}.{field}", before.get(field), now.get(field))
    return f"{name}={before}, not {now}"
