"""The results file of a study, with one JSON object per line.

Each part of a study appends a line when it is done, so that an interrupted study can continue. Several processes may
work on one study; each of them writes only while it holds the lock of the file.
"""

import json
import os
from pathlib import Path
from typing import Any

from tfm_jax.errors import InputError
from tfm_jax.files import lock

Record = dict[str, Any]


class Results:
    """The results measured so far. The first line holds the settings, which must not change when the study continues.

    Raises:
        InputError: the file belongs to a study with other settings, or is not the results file of a study.
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
                difference = _difference(name, before, value)
                raise InputError(f"{file}: belongs to a study with {difference}; choose another --output")

    def add(self, kind: str, **values: Any) -> Record:
        """Append a record."""
        record = {"kind": kind, **values}
        with lock(self.file, wait=True):
            self._append(record)
        return record

    def _append(self, record: Record) -> None:
        """Append a record, replacing an incomplete last line that a killed process left. The caller holds the lock."""
        os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.records.append(record)

    def reload(self) -> None:
        """Read the file again, because other processes may have added records."""
        self.records = _read(self.file)

    def all(self, kind: str, **values: Any) -> list[Record]:
        """Return all records of this kind with these values."""
        return [r for r in self.records if r["kind"] == kind and all(r.get(n) == v for n, v in values.items())]

    def one(self, kind: str, **values: Any) -> Record:
        """Return the first record of this kind with these values; an empty one if there is none."""
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
        raise InputError(f"{file}: is not the results file of a study ({error}); choose another --output") from None
    return records


def _difference(name: str, before: Any, now: Any) -> str:
    """Describe the first field in which two settings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        field = next(field for field in sorted(before.keys() | now.keys()) if before.get(field) != now.get(field))
        return _difference(f"{name}.{field}", before.get(field), now.get(field))
    return f"{name}={before}, not {now}"
