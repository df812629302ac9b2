"""Reads prepared clips from disk, without TensorFlow. `tfm_jax.data.format` describes the files."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tfm_jax.arrays import DTYPES, TEXT_LENGTH
from tfm_jax.data.format import (
    EMPTY_PROMPT,
    INDEX,
    INFO,
    MANIFEST,
    REMEDY,
    Entry,
    Manifest,
    Record,
    Shard,
    make_features,
    read_index,
    read_manifest,
)
from tfm_jax.errors import InputError
from tfm_jax.wan.components import Component
from tfm_jax.wan.fingerprint import fingerprint


class Records:
    """Random access to prepared clips: supports `records[i]` and `len(records)`. Returned by `open_records`."""

    def __init__(self, folder: Path, manifest: Manifest, index: list[Entry], empty_prompt: Float[np.ndarray, "l d"]):
        self.folder = folder
        self.manifest = manifest
        self.index = index
        """What is known about every record without reading it."""
        self.empty_prompt = empty_prompt
        """Embedding of the empty prompt."""
        self._features = make_features(manifest.dtype, self.channels, self.text_dim)
        # With the number of records in brackets, a shard is opened only when a record is read from it.
        shards = [f"{folder / shard.file}[0:{shard.records}]" for shard in manifest.shards]
        self._source = ArrayRecordDataSource(shards)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def channels(self) -> int:
        """Number of channels of the latents."""
        return self.index[0].latents[-1]

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings."""
        return self.empty_prompt.shape[-1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all records in order and of how they were made. The location of the folder does not matter."""
        made = self.manifest.model_dump_json(exclude={"model", "shards"})
        return hashlib.sha256((self.folder / INDEX).read_bytes() + made.encode()).hexdigest()[:16]

    def __getitem__(self, number: int) -> Record:
        """Read a record, counted from 0.

        Raises:
            IndexError: there is no such record.
            InputError: the record is damaged, or differs from the one that was prepared.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        try:
            fields: Any = self._features.deserialize_example_np(self._source[number])
            record = Record(fields["latents"], fields["text"], fields["prompt"].decode(), fields["video"].decode())
            entry = Entry(record.video, record.latents.shape, len(record.text), record.fingerprint)
        except Exception as error:  # TFDS may raise any exception
            raise InputError(f"{self.folder}: clip {number} is damaged; {REMEDY} ({_one_line(error)})") from error
        if entry != self.index[number]:
            clip = f"clip {number} ({record.video[:100]})"
            raise InputError(f"{self.folder}: {clip} differs from the one that was prepared; {REMEDY}")
        return record


def open_records(folder: Path) -> Records:
    """Open a folder that tfm-prepare wrote.

    Raises:
        InputError: the folder does not exist or holds something else, an earlier version wrote it, or a file is
            missing, damaged or of the wrong length.
    """
    if not (folder / MANIFEST).is_file():
        if (folder / INFO).is_file():
            raise InputError(f"{folder}: contains no {MANIFEST}, so an earlier version wrote it; {REMEDY}")
        raise InputError(f"{folder}: contains no {MANIFEST}; expected a folder that tfm-prepare wrote")
    manifest, index = read_manifest(folder), read_index(folder)
    count = sum(shard.records for shard in manifest.shards)
    if not 0 < len(index) == count:
        raise InputError(f"{folder / INDEX}: contains {len(index)} lines for {count} clips; {REMEDY}")
    for shard in manifest.shards:
        _check_shard(folder / shard.file, shard)
    return Records(folder, manifest, index, _read_empty_prompt(folder / EMPTY_PROMPT, manifest))


def check_encoder(records: Records, model: Path, component: Component) -> bool:
    """Return whether the model in a directory has this encoder, the autoencoder or the text encoder.

    Raises:
        InputError: it is not the one that made the clips.
    """
    found, before = fingerprint(model, component), records.manifest.encoders.get(component.name)
    if found is not None and found != before:
        raise InputError(
            f"data.path={records.folder}: was prepared with the {component.name} {before}, but model.path={model} has "
            f"the {component.name} {found}; use that model, or prepare the data with this one"
        )
    return found is not None


def _check_shard(path: Path, expected: Shard) -> None:
    if not path.is_file():
        raise InputError(f"{path}: is missing; {REMEDY}")
    size = path.stat().st_size
    if size != expected.bytes:
        raise InputError(f"{path}: is damaged ({size} bytes, not {expected.bytes}); {REMEDY}")
    try:
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except Exception as error:  # its message may be empty
        raise InputError(f"{path}: is damaged ({_one_line(error)}); {REMEDY}") from error
    if found != expected.records:
        raise InputError(f"{path}: contains {found} clips, not {expected.records}; {REMEDY}")


def _read_empty_prompt(file: Path, manifest: Manifest) -> Float[np.ndarray, "l d"]:
    try:
        text = load_file(file)["text"]
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{file}: is missing or damaged ({_one_line(error)}); {REMEDY}") from None
    if text.ndim != 2 or not 0 < len(text) <= TEXT_LENGTH or text.dtype != DTYPES[manifest.dtype]:
        found = f"{text.dtype} {list(text.shape)}"
        expected = f"{manifest.dtype} [tokens, width] with at most {TEXT_LENGTH} tokens"
        raise InputError(f"{file}: text is {found}; expected {expected}; {REMEDY}")
    if not np.isfinite(text).all():
        raise InputError(f"{file}: text has a NaN or infinite value; {REMEDY}")
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
