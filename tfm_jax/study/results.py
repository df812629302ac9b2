"""The file of a study: one JSON object a line, written when its part is done, so that a study cut off can go on.

Several processes may work on one study: each part is taken by whoever has its lock, which goes with its process.
"""

import json
from pathlib import Path
from typing import Any

from tfm_jax.errors import InputError

Record = dict[str, Any]


class Results:
    """What has been measured so far. The first line holds the settings, which every later start must share.

    Raises:
        InputError: the file is of a study with other settings, or is no such file.
    """

    def __init__(self, file: Path, settings: Record):
        self.file = file
        self.records = _read(file)
        if not self.records:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("", encoding="utf-8")
            self.add("settings", **settings)
        for name, value in settings.items():
            before = self.one("settings").get(name)
            if before != value:
                raise InputError(f"{file}: a study with {_difference(name, before, value)}; name another --output")
        # A line that was cut off goes; whole ones stay as they are.
        lines = [json.dumps(record) + "\n" for record in self.records]
        if file.read_text(encoding="utf-8") != "".join(lines):
            partial = file.with_name(f"{file.name}.partial")
            partial.write_text("".join(lines), encoding="utf-8")
            partial.replace(file)

    def add(self, kind: str, **values: Any) -> Record:
        """Append a record."""
        record = {"kind": kind, **values}
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.records.append(record)
        return record

    def reload(self) -> None:
        """Read what other processes have added."""
        self.records = _read(self.file)

    def all(self, kind: str, **values: Any) -> list[Record]:
        """Records of this kind with these values."""
        return [r for r in self.records if r["kind"] == kind and all(r.get(n) == v for n, v in values.items())]

    def one(self, kind: str, **values: Any) -> Record:
        """The only such record; empty where there is none."""
        found = self.all(kind, **values)
        return found[0] if found else {}


def _read(file: Path) -> list[Record]:
    if not file.exists():
        return []
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    try:
        records = [json.loads(line) for line in lines]
        if records and records[0]["kind"] != "settings":
            raise ValueError("no settings in the first line")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the results of a study ({error}); name another --output") from None
    return records


def _difference(name: str, before: Any, now: Any) -> str:
    """Down to the field in which two settings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        field = next(field for field in sorted(before.keys() | now.keys()) if before.get(field) != now.get(field))
        return _difference(f"{name}.{field}", before.get(field), now.get(field))
    return f"{name}={before}, not {now}"
