"""Prepared clips on disk: a TFDS dataset of ArrayRecord shards, written and read without TensorFlow.

Other programs open it with `tfds.builder_from_directory(folder).as_data_source("train")`.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Float32

from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.errors import InputError
from tfm_jax.files import check_new_directory, lock

NAME = "tfm_clips"
INFO = "dataset_info.json"
FINGERPRINTS = "fingerprints.txt"
"""One line per record: the hexadecimal `_digest` of it, in the order of the records."""
REJECTED = "rejected.jsonl"
"""One line per clip that could not be used; there is no such file when all could be."""
LOCK = "lock"
"""In the unfinished folder, held by the run that writes it."""
SPLIT = "train"
FIELDS = {"latents", "text", "prompt", "video"}
SHARD_BYTES = 2**30


class Record(NamedTuple):
    """One prepared clip."""

    latents: Float32[np.ndarray, "f h w c"]
    """Normalised latents of the video autoencoder."""
    text: Float32[np.ndarray, "l d"]
    """Embedding of the prompt, as many tokens as it has."""
    prompt: str
    video: str
    """Name of the video file."""


class RecordWriter:
    """Context manager that writes records one by one into `folder.partial` and renames it at a clean end.

    After an exception nothing is kept. What a killed run left in `folder.partial` is replaced. `metadata` (JSON values:
    model, size of the clips) are kept beside the records.

    Raises:
        InputError: on entering, `folder` cannot become a new folder, another run writes it, or another program made
            `folder.partial`; on leaving, no record was written.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any]):
        self.folder = folder
        self._target = Path(os.path.realpath(folder))  # a folder cannot be renamed to a link
        self.partial = self._target.parent / f"{self._target.name}.partial"
        self._metadata = metadata
        self._writer: tfds.core.SequentialWriter | None = None
        self._digests: list[str] = []
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "RecordWriter":
        check_new_directory("data.path", self.folder)
        if os.path.ismount(self._target):
            raise InputError(f"data.path={self.folder}: a mount point; expected a folder inside it, such as latents")
        if self.partial.is_dir() and any(self.partial.iterdir()) and not (self.partial / LOCK).exists():
            raise InputError(f"{self.partial}: not made by this version of prepare_data.py; remove it or rename it")
        with contextlib.ExitStack() as held:
            if not held.enter_context(lock(self.partial / LOCK)):
                raise InputError(f"{self.folder}: another run is preparing it; wait for it or name another data.path")
            if self._remove_files():
                print(f"note: {self.partial}: a run ended before it was finished; its files are removed", flush=True)
            self._lock = held.pop_all()
        return self

    def _remove_files(self) -> bool:
        """Whether there were any. The lock stays: it marks a folder that may be replaced."""
        files = [path for path in self.partial.iterdir() if path.name != LOCK]
        for path in files:
            path.unlink()
        return bool(files)

    def write(self, record: Record) -> None:
        """Append one record; all must have latents of one shape and text of one width.

        Raises:
            InputError: a value that is not finite.
        """
        if not (np.isfinite(record.latents).all() and np.isfinite(record.text).all()):
            raise InputError(f"{record.video}: its latents or text are not finite; expected sound weights of the model")
        if len(record.text) > TEXT_LENGTH:
            raise ValueError(f"{record.video}: {len(record.text)} text tokens; expected at most {TEXT_LENGTH}")
        if self._writer is None:
            self._writer = self._start(record)
        self._writer.add_examples({SPLIT: [record._asdict()]})
        self._digests.append(_digest(record))

    def reject(self, video: str, line: int, reason: str) -> None:
        """Note a clip that cannot be used in rejected.jsonl.

        Args:
            video: its name in metadata.csv.
            line: where its row starts in metadata.csv, from 1.
        """
        with open(self.partial / REJECTED, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"line": line, "video": video, "reason": reason}, ensure_ascii=False) + "\n")

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
                    with contextlib.suppress(Exception):  # on a full disk closing fails too
                        self._writer.close_all()
            finally:
                with contextlib.suppress(OSError):  # after a clean end there is no such folder
                    self._remove_files()
                    shutil.rmtree(self.partial)

    def _finish(self) -> None:
        if self._writer is None:
            raise InputError(f"{self.folder}: no clip to write; expected at least one")
        self._writer.close_all()
        (self.partial / FINGERPRINTS).write_text("".join(f"{digest}\n" for digest in self._digests), encoding="ascii")
        (self.partial / LOCK).unlink()
        self.partial.rename(self._target)


class Records:
    """Random access to prepared clips: `len(records)`, `records[i]`. Made by `open_records`."""

    def __init__(self, folder: Path, source: Any, digests: Sequence[str], metadata: dict[str, Any]):
        self.folder = folder
        self.metadata = metadata
        self._source = source
        self._digests = digests

    def __len__(self) -> int:
        return len(self._source)

    @property
    def fingerprint(self) -> str:
        """Identifies the content of the dataset, wherever its folder is: a hash of all records in their order."""
        content = (self.folder / FINGERPRINTS).read_bytes() + (self.folder / INFO).read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def __getitem__(self, index: int) -> Record:
        """Record `index`, 0 <= index < len.

        Raises:
            InputError: it is damaged, or is not the record that was written there.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            fields = self._source[index]
            record = Record(fields["latents"], fields["text"], fields["prompt"].decode(), fields["video"].decode())
            digest = _digest(record)
        except Exception as error:  # ArrayRecord: RuntimeError (wrong checksum); TFDS: whatever its decoders raise
            reason = _line(error)
            raise InputError(f"{self.folder}: clip {index} is damaged; prepare the data again ({reason})") from error
        if digest != self._digests[index]:
            clip = f"clip {index} ({record.video[:100]})"
            raise InputError(f"{self.folder}: {clip} is not what was prepared; prepare the data again")
        return record


def open_records(folder: Path) -> Records:
    """Open what `RecordWriter` wrote.

    Raises:
        InputError: no such folder, a dataset of another kind or of an earlier version, or a shard that is missing,
            damaged or of another length.
    """
    expected = "expected a folder that prepare_data.py wrote"
    if not (folder / INFO).is_file():
        raise InputError(f"{folder}: no {INFO} in it; {expected}")
    if not (folder / FINGERPRINTS).is_file():
        raise InputError(f"{folder}: no {FINGERPRINTS} in it, so an earlier version wrote it; prepare the data again")
    try:
        builder: Any = tfds.builder_from_directory(folder)
        features = builder.info.features
        fields = set(features.keys())
        ours = fields == FIELDS and _is_ours(features)
        metadata = dict(builder.info.metadata)
        split = builder.info.splits[SPLIT]
        shards = list(zip(map(Path, split.filepaths), split.shard_lengths, strict=True))
        source = builder.as_data_source(split=SPLIT)
    except Exception as error:  # TFDS lets through whatever its parsers raise
        raise InputError(f"{folder}: cannot be read ({_line(error)}); {expected}") from error
    if fields != FIELDS:
        raise InputError(f"{folder}: a dataset of {', '.join(sorted(fields))}; {expected}")
    if not ours:
        raise InputError(f"{folder}: features.json is not what prepare_data.py writes; prepare the data again")
    for shard, length in shards:
        _check_shard(shard, length)
    digests = (folder / FINGERPRINTS).read_text(encoding="latin-1").split()
    if len(digests) != len(source):
        count = f"{len(digests)} lines for {len(source)} clips"
        raise InputError(f"{folder / FINGERPRINTS}: {count}; prepare the data again")
    return Records(folder, source, digests, metadata)


def _features(latents_shape: tuple[int, ...], text_dim: int) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "latents": tfds.features.Tensor(shape=latents_shape, dtype=np.float32, encoding="bytes"),
            "text": tfds.features.Tensor(shape=(None, text_dim), dtype=np.float32, encoding="bytes"),
            "prompt": tfds.features.Text(),
            "video": tfds.features.Text(),
        }
    )


def _is_ours(features: Any) -> bool:
    return features.to_json() == _features(features["latents"].shape, features["text"].shape[-1]).to_json()


def _check_shard(shard: Path, length: int) -> None:
    remedy = "prepare the data again"
    if not shard.is_file():
        raise InputError(f"{shard}: missing; {remedy}")
    try:
        reader = ArrayRecordReader(str(shard))
        found = reader.num_records()
        reader.close()
    except Exception as error:  # its message may be empty
        raise InputError(f"{shard}: damaged ({_line(error)}); {remedy}") from error
    if found != length:
        raise InputError(f"{shard}: {found} clips; expected {length}: {remedy}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _digest(record: Record) -> str:
    """A hash of all that a record holds."""
    parts = [record.latents.dtype.str, record.latents.shape, record.text.dtype.str, record.text.shape, *record[2:]]
    state = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8)
    for array in (record.latents, record.text):
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()
