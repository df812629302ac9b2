"""The record of a checkpoint: its step, a description of its arrays, and the metadata of the run.

Orbax stores the record as custom metadata: one JSON text and its checksum. Orbax does not see the numbers in this text,
because it may change how they are written.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array

from tfm_jax.checkpoint.fingerprints import Summary
from tfm_jax.errors import InputError


class DamagedError(Exception):
    """A checkpoint differs from what was saved; the message says how."""


class Record(NamedTuple):
    """What a checkpoint says about itself."""

    step: int
    arrays: dict[str, dict[str, Any]]
    """Path -> shape, dtype and fingerprint."""
    metadata: dict[str, Any]
    """JSON data that the run saved with the arrays."""


def make_record(
    step: int, arrays: Mapping[str, Array], summaries: Mapping[str, Summary], metadata: dict[str, Any]
) -> Record:
    """Return the record of a checkpoint of these arrays."""
    described = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), "fingerprint": summaries[name].fingerprint}
        for name, array in arrays.items()
    }
    return Record(step, described, metadata)


def to_orbax(record: Record) -> dict[str, str]:
    """Convert a record to custom metadata for Orbax."""
    text = json.dumps(record._asdict())
    return {"record": text, "sha256": _sha256(text)}


def read_record(checkpoint: Path) -> Record:
    """Read the record of a checkpoint.

    Raises:
        DamagedError: the record differs from what was saved, or the checkpoint is not a folder.
        InputError: version 0.1.0 of this package wrote the checkpoint, without a checksum.
        Exception: of any type, because damaged files make the JSON parser raise many types.
    """
    if not checkpoint.is_dir():
        raise DamagedError("the checkpoint is not a folder")
    content = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))["custom_metadata"]
    if content.keys() == {"arrays", "facts"}:
        raise InputError(f"{checkpoint}: was written by version 0.1.0, without a checksum; expected a later version")
    if content.keys() != {"record", "sha256"} or _sha256(content["record"]) != content["sha256"]:
        raise DamagedError("the metadata differs from what was saved")
    record = Record(**json.loads(content["record"]))
    if record.step != int(checkpoint.name):
        raise DamagedError(f"the metadata belongs to step {record.step}")
    return record


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
