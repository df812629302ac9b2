"""Prepared clips on disk: a TFDS dataset of ArrayRecord shards, written and read without TensorFlow.

Other programs can open the dataset with `tfds.builder_from_directory(folder).as_data_source("train")`.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.data.format import Record
from tfm_jax.errors import InputError
from tfm_jax.files import check_new_directory, lock

NAME = "tfm_clips"
INFO = "dataset_info.json"
FINGERPRINTS = "fingerprints.txt"
"""The file with the hexadecimal `_fingerprint` of every record, one per line, in the order of the records."""
REJECTED = "rejected.jsonl"
"""The file with one line per clip that could not be used. It exists only if there are such clips."""
LOCK = "lock"
"""The lock file in the unfinished folder, held by the run that writes to the folder."""
SPLIT = "train"
FIELDS = {"latents", "text", "prompt", "video"}
STORED = np.dtype(np.float32)
"""Data type of the stored latents and text embeddings."""
SHARD_BYTES = 2**30


class RecordWriter:
    """Context manager that writes records one by one into `folder.partial` and finally renames this folder to `folder`.

    After an exception, nothing is kept. Files that a killed run left in `folder.partial` are removed. `metadata` is
    stored with the records: JSON values that describe the model and the clips.

    Raises:
        InputError: on entering, `folder` is not empty or cannot be created, another run is writing to it, or this
            version did not create `folder.partial`; on leaving, no record was written.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any]):
        self.folder = folder
        self._target = Path(os.path.realpath(folder))  # resolves links, because a folder cannot be renamed onto one
        self.partial = self._target.parent / f"{self._target.name}.partial"
        self._metadata = metadata
        self._writer: tfds.core.SequentialWriter | None = None
        self._fingerprints: list[str] = []
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "RecordWriter":
        check_new_directory("data.path", self.folder)
        if os.path.ismount(self._target):
            raise InputError(
                f"data.path={self.folder}: is a mount point; use a folder inside it, such as {self.folder}/latents"
            )
        if self.partial.is_dir() and any(self.partial.iterdir()) and not (self.partial / LOCK).exists():
            raise InputError(f"{self.partial}: was not made by this version of tfm-prepare; remove or rename it")
        with contextlib.ExitStack() as held:
            if not held.enter_context(lock(self.partial / LOCK)):
                raise InputError(f"{self.folder}: is in use by another run; wait for that run to finish")
            if self._remove_files():
                print(f"note: {self.partial}: removed the files of an unfinished run", flush=True)
            self._lock = held.pop_all()
        return self

    def _remove_files(self) -> bool:
        """Remove all files except the lock, and return whether there were any.

        The lock stays, because it marks a folder that may be replaced.
        """
        files = [path for path in self.partial.iterdir() if path.name != LOCK]
        for path in files:
            path.unlink()
        return bool(files)

    def write(self, record: Record) -> None:
        """Append a record.

        The latents of all records must have the same shape, and the text embeddings must have the same width.

        Raises:
            InputError: a value is not finite.
            ValueError: the text has more than 512 tokens.
        """
        if not (np.isfinite(record.latents).all() and np.isfinite(record.text).all()):
            problem = "the latents or the text embedding are not finite"
            raise InputError(f"{record.video}: {problem}; check the weights of the model")
        if len(record.text) > TEXT_LENGTH:
            raise ValueError(f"{record.video}: {len(record.text)} text tokens; expected at most {TEXT_LENGTH}")
        if self._writer is None:
            self._writer = self._start(record)
        self._writer.add_examples({SPLIT: [record._asdict()]})
        self._fingerprints.append(_fingerprint(record))

    def reject(self, video: str, origin: Mapping[str, int | str], reason: str) -> None:
        """Add a clip that cannot be used to rejected.jsonl.

        Args:
            video: path of the clip as written in the list of clips.
            origin: where in the list the clip is given, such as `{"line": 7}`.
        """
        with open(self.partial / REJECTED, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({**origin, "video": video, "reason": reason}, ensure_ascii=False) + "\n")

    def _start(self, first: Record) -> tfds.core.SequentialWriter:
        version = tfds.core.Version("1.0.0")
        info = tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(NAME, version, data_dir=str(self.partial), module_name=""),
            features=_features(first.latents.shape, first.text.shape[1]),
            metadata=tfds.core.MetadataDict(self._metadata),
        )
        per_record = first.latents.nbytes + TEXT_LENGTH * first.text.shape[1] * first.text.itemsize
        per_shard = max(1, SHARD_BYTES // per_record)
        writer = tfds.core.SequentialWriter(info, max_examples_per_shard=per_shard, file_format="array_record")
        writer.initialize_splits([SPLIT])
        return writer

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            try:
                if kind is None:
                    self._finish()
                elif self._writer is not None:
                    with contextlib.suppress(Exception):  # on a full disk, closing fails too
                        self._writer.close_all()
            finally:
                with contextlib.suppress(OSError):  # if all went well, the folder has been renamed
                    self._remove_files()
                    shutil.rmtree(self.partial)

    def _finish(self) -> None:
        if self._writer is None:
            raise InputError(f"{self.folder}: no clips were written; expected at least one")
        self._writer.close_all()
        lines = "".join(f"{fingerprint}\n" for fingerprint in self._fingerprints)
        (self.partial / FINGERPRINTS).write_text(lines, encoding="ascii")
        (self.partial / LOCK).unlink()
        self.partial.rename(self._target)


class Records:
    """Random access to prepared clips: supports `records[i]` and `len(records)`. Returned by `open_records`."""

    def __init__(self, folder: Path, source: Any, fingerprints: Sequence[str], metadata: dict[str, Any]):
        self.folder = folder
        self.metadata = metadata
        self._source = source
        self._fingerprints = fingerprints

    def __len__(self) -> int:
        return len(self._source)

    @property
    def fingerprint(self) -> str:
        """Hash of the dataset's description and of all records in order. The location of the folder does not matter."""
        content = (self.folder / FINGERPRINTS).read_bytes() + (self.folder / INFO).read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def __getitem__(self, index: int) -> Record:
        """Read record `index`, which is counted from 0.

        Raises:
            IndexError: there is no such record.
            InputError: the record is damaged, or differs from the one that was prepared.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            fields = self._source[index]
            record = Record(fields["latents"], fields["text"], fields["prompt"].decode(), fields["video"].decode())
            fingerprint = _fingerprint(record)
        except Exception as error:  # TFDS may raise any exception
            reason = _one_line(error)
            raise InputError(f"{self.folder}: clip {index} is damaged; prepare the data again ({reason})") from error
        if fingerprint != self._fingerprints[index]:
            clip = f"clip {index} ({record.video[:100]})"
            raise InputError(f"{self.folder}: {clip} differs from the one that was prepared; prepare the data again")
        return record


def open_records(folder: Path) -> Records:
    """Open a folder that `RecordWriter` wrote.

    Raises:
        InputError: the folder does not exist or holds another kind of dataset, an earlier version wrote it, or a shard
            is missing, damaged or of the wrong length.
    """
    expected = "expected a folder that tfm-prepare wrote"
    if not (folder / INFO).is_file():
        raise InputError(f"{folder}: contains no {INFO}; {expected}")
    if not (folder / FINGERPRINTS).is_file():
        raise InputError(
            f"{folder}: contains no {FINGERPRINTS}, perhaps because an earlier version wrote it; prepare the data again"
        )
    try:
        builder: Any = tfds.builder_from_directory(folder)
        features = builder.info.features
        fields = set(features.keys())
        ours = fields == FIELDS and _is_ours(features)
        metadata = dict(builder.info.metadata)
        split = builder.info.splits[SPLIT]
        shards = list(zip(map(Path, split.filepaths), split.shard_lengths, strict=True))
        source = builder.as_data_source(split=SPLIT)
    except Exception as error:  # TFDS may raise any exception
        raise InputError(f"{folder}: cannot be read ({_one_line(error)}); {expected}") from error
    if fields != FIELDS:
        raise InputError(f"{folder}: is a dataset with the fields {', '.join(sorted(fields))}; {expected}")
    if not ours:
        raise InputError(f"{folder}: features.json differs from what tfm-prepare writes; prepare the data again")
    for shard, length in shards:
        _check_shard(shard, length)
    fingerprints = (folder / FINGERPRINTS).read_text(encoding="latin-1").split()
    if len(fingerprints) != len(source):
        count = f"contains {len(fingerprints)} lines for {len(source)} clips"
        raise InputError(f"{folder / FINGERPRINTS}: {count}; prepare the data again")
    return Records(folder, source, fingerprints, metadata)


def _features(latents_shape: tuple[int, ...], text_dim: int) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "latents": tfds.features.Tensor(shape=latents_shape, dtype=STORED, encoding="bytes"),
            "text": tfds.features.Tensor(shape=(None, text_dim), dtype=STORED, encoding="bytes"),
            "prompt": tfds.features.Text(),
            "video": tfds.features.Text(),
        }
    )


def _is_ours(features: Any) -> bool:
    return features.to_json() == _features(features["latents"].shape, features["text"].shape[-1]).to_json()


def _check_shard(shard: Path, length: int) -> None:
    remedy = "prepare the data again"
    if not shard.is_file():
        raise InputError(f"{shard}: is missing; {remedy}")
    try:
        reader = ArrayRecordReader(str(shard))
        found = reader.num_records()
        reader.close()
    except Exception as error:  # its message may be empty
        raise InputError(f"{shard}: is damaged ({_one_line(error)}); {remedy}") from error
    if found != length:
        raise InputError(f"{shard}: contains {found} clips, not {length}; {remedy}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _fingerprint(record: Record) -> str:
    """Return a hash of all fields of a record."""
    parts = [record.latents.dtype.str, record.latents.shape, record.text.dtype.str, record.text.shape, *record[2:]]
    state = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8)
    for array in (record.latents, record.text):
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()
