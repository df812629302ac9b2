"""Prepared clips on disk: a TFDS dataset of ArrayRecord shards, written and read without TensorFlow.

Other programs open it with `tfds.builder_from_directory(folder).as_data_source("train")`.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Float32

from tfm_jax.errors import InputError
from tfm_jax.wan.transformer import TEXT_LENGTH

NAME = "tfm_clips"
INFO = "dataset_info.json"
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

    After an exception nothing is left. `facts` (JSON values: model, size of the clips) are kept beside the records.

    Raises:
        InputError: on entering, `folder` is there already and not empty, or `folder.partial` is; on leaving, no
            record was written.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder = folder
        self.partial = folder.with_name(f"{folder.name}.partial")
        self._facts = facts
        self._writer: tfds.core.SequentialWriter | None = None

    def __enter__(self) -> "RecordWriter":
        if self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise InputError(f"{self.folder}: exists and is not an empty folder; name another one or remove it")
        try:
            self.partial.mkdir(parents=True)
        except FileExistsError:
            raise InputError(
                f"{self.partial}: left by a run that was killed, or being written; remove it if no run is at work"
            ) from None
        return self

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

    def _start(self, first: Record) -> tfds.core.SequentialWriter:
        version = tfds.core.Version("1.0.0")
        info = tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(NAME, version, data_dir=str(self.partial), module_name=""),
            features=_features(first.latents.shape, first.text.shape[1]),
            metadata=tfds.core.MetadataDict(self._facts),
        )
        per_record = first.latents.nbytes + TEXT_LENGTH * first.text.shape[1] * first.text.itemsize
        per_shard = max(1, SHARD_BYTES // per_record)
        writer = tfds.core.SequentialWriter(info, max_examples_per_shard=per_shard, file_format="array_record")
        writer.initialize_splits([SPLIT])
        return writer

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        done = False
        try:
            if self._writer is not None:
                self._writer.close_all()
            if kind is None and self._writer is None:
                raise InputError(f"{self.folder}: no clip to write; expected at least one")
            if kind is None:
                self.partial.rename(self.folder)
                done = True
        finally:
            if not done:
                shutil.rmtree(self.partial, ignore_errors=True)


class Records:
    """Random access to prepared clips: `len(records)`, `records[i]`. Made by `open_records`."""

    def __init__(self, folder: Path, source: Any, facts: dict[str, Any]):
        self.folder = folder
        self.facts = facts
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @property
    def mark(self) -> str:
        """A name for the dataset, the same wherever it lies: of what made it, and of the size of every shard."""
        return hashlib.sha256((self.folder / INFO).read_bytes()).hexdigest()[:16]

    def __getitem__(self, index: int) -> Record:
        """Record `index`, 0 <= index < len. Raises InputError where its bytes are damaged."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            fields = self._source[index]
        except RuntimeError as error:  # all that ArrayRecord raises; a checksum guards every record
            raise InputError(f"{self.folder}: clip {index} is damaged; prepare the data again ({error})") from error
        return Record(fields["latents"], fields["text"], fields["prompt"].decode(), fields["video"].decode())


def open_records(folder: Path) -> Records:
    """Open what `RecordWriter` wrote.

    Raises:
        InputError: no such folder, a dataset of another kind, or a shard that is missing, damaged or of another length.
    """
    expected = "expected a folder that prepare_data.py wrote"
    if not (folder / INFO).is_file():
        raise InputError(f"{folder}: no {INFO} in it; {expected}")
    try:
        builder: Any = tfds.builder_from_directory(folder)
        fields = set(builder.info.features.keys())
        facts = dict(builder.info.metadata)
        split = builder.info.splits[SPLIT]
    except Exception as error:  # TFDS lets through whatever its parsers raise
        raise InputError(f"{folder}: cannot be read ({_line(error)}); {expected}") from error
    if fields != FIELDS:
        raise InputError(f"{folder}: a dataset of {', '.join(sorted(fields))}; {expected}")
    for shard, length in zip(split.filepaths, split.shard_lengths, strict=True):
        _check_shard(Path(shard), length)
    return Records(folder, builder.as_data_source(split=SPLIT), facts)


def _features(latents_shape: tuple[int, ...], text_dim: int) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "latents": tfds.features.Tensor(shape=latents_shape, dtype=np.float32, encoding="bytes"),
            "text": tfds.features.Tensor(shape=(None, text_dim), dtype=np.float32, encoding="bytes"),
            "prompt": tfds.features.Text(),
            "video": tfds.features.Text(),
        }
    )


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
