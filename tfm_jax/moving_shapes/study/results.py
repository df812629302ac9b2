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

    The file is created when the first record is added.

    Raises:
        InputError: the file belongs to a study with other settings, or is not the results file of a study.
    """

    def __init__(self, file: Path, settings: Record):
        self.file = file
        self.settings = {"kind": "settings", **settings}
        self.reload()
        if self.records and (difference := find_difference(self.records[0], self.settings)):
            raise InputError(f"{file}: belongs to a study with {difference}; choose another --docs")

    def add(self, kind: str, **values: Any) -> Record:
        """Append a record, replacing an incomplete last line that a killed process left."""
        record = {"kind": kind, **values}
        with lock(self.file, wait=True):
            os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)
            with open(self.file, "a", encoding="utf-8") as stream:
                for new in [record] if stream.tell() else [self.settings, record]:
                    stream.write(json.dumps(new) + "\n")
        self.records += [record] if self.records else [self.settings, record]
        return record

    def reload(self) -> None:
        """Read the file again, because other processes may have added records."""
        self.records = _read(self.file) if self.file.exists() else []

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
        raise InputError(f"{file}: is not the results file of a study ({error}); choose another --docs") from None
    return records


def find_difference(before: Record, now: Record, prefix: str = "") -> str | None:
    """Describe the first field in which two settings differ; return None if they are equal."""
    for name in sorted(before.keys() | now.keys()):
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            if difference := find_difference(one, other, f"{prefix}{name}."):
                return difference
        elif one != other:
            return f"{prefix}{name}={one}, not {other}"
    return None
