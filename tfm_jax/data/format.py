"""The files of prepared clips: a TFDS dataset of ArrayRecord shards, an index of its records, and a manifest.

Nothing needs TensorFlow. Other programs can open the dataset with
`tfds.builder_from_directory(folder).as_data_source("train")`.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pydantic
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float
from safetensors.numpy import save_file
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.splits import SplitDict

from tfm_jax.arrays import DTYPES, TEXT_LENGTH, Dtype
from tfm_jax.errors import InputError
from tfm_jax.files import replacing

Line = dict[str, int | str]
"""A line of rejected.jsonl: where the video is listed, such as `"line": 7`, its name, and the reason."""

Model = TypeVar("Model", bound=pydantic.BaseModel)

VERSION = 1
NAME = "tfm_clips"
SPLIT = "train"
INFO = "dataset_info.json"
FEATURES = "features.json"
INDEX = "index.jsonl"
"""The file with one `Entry` per line, in the order of the records."""
MANIFEST = "manifest.json"
EMPTY_PROMPT = "empty_prompt.safetensors"
"""The file with the embedding of the empty prompt: a tensor `text`, [tokens, width]."""
REJECTED = "rejected.jsonl"
"""The file with one line per clip that could not be used. It exists only if there are such clips."""

REMEDY = "prepare the data again"
"""What messages about damaged files advise."""


class Record(NamedTuple):
    """One prepared clip. The arrays have the dtype in which they are stored."""

    latents: Float[np.ndarray, "f h w c"]
    """Normalised latents."""
    text: Float[np.ndarray, "l d"]
    """Embedding of the prompt, one row per token, without padding."""
    prompt: str
    video: str
    """Path of the video or image as written in the list of clips. `#t=` and the seconds before the clip follow, if the
    clip does not begin at the start of the video."""

    @property
    def fingerprint(self) -> str:
        """Hash of all fields, in 16 hexadecimal digits."""
        about = [self.latents.dtype.name, self.latents.shape, self.text.shape, self.prompt, self.video]
        state = hashlib.blake2b(json.dumps(about).encode(), digest_size=8)
        for array in (self.latents, self.text):
            state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return state.hexdigest()


class Entry(NamedTuple):
    """A line of the index: what is known about a record without reading it."""

    video: str
    latents: tuple[int, int, int, int]
    """Shape of the latents: frames, height, width and channels."""
    tokens: int
    """Number of text tokens."""
    fingerprint: str


_LINE = pydantic.TypeAdapter(Entry)


class Strict(pydantic.BaseModel):
    """A pydantic model of a JSON file of ours."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Shard(Strict):
    """What the manifest says about a shard."""

    file: str
    records: pydantic.NonNegativeInt
    bytes: pydantic.NonNegativeInt
    """Size of the file."""
    sha256: str


class Manifest(Strict):
    """How the records of a folder were made, and what their shards contain."""

    version: Literal[1] = VERSION
    encoders: dict[str, str]
    """Name of an encoder, vae or text_encoder -> fingerprint of its weights."""
    dtype: Dtype
    clip: dict[str, Any]
    """The section `clip` of the configuration, as plain values."""
    data_seed: int
    model: str
    """Path of the model, as given."""
    clips: str
    """Fingerprint of the list of clips."""
    shards: list[Shard] = []


def shard_name(number: int, count: int) -> str:
    """Return the file name of a shard; `number` counts from 0, and `count` is the number of shards."""
    return f"{NAME}-{SPLIT}.array_record-{number:05}-of-{count:05}"


def make_features(dtype: Dtype, channels: int, text_dim: int) -> tfds.features.FeaturesDict:
    """Return the TFDS features of a folder. The sizes of latents may differ from record to record."""
    stored = DTYPES[dtype]
    return tfds.features.FeaturesDict(
        {
            "latents": tfds.features.Tensor(shape=(None, None, None, channels), dtype=stored, encoding="bytes"),
            "text": tfds.features.Tensor(shape=(None, text_dim), dtype=stored, encoding="bytes"),
            "prompt": tfds.features.Text(),
            "video": tfds.features.Text(),
        }
    )


def serialise(record: Record) -> bytes:
    """Return the bytes of a record as TFDS stores them. The same record always gives the same bytes.

    Raises:
        InputError: a value is not finite.
        ValueError: the text has more than 512 tokens, or latents and text differ in dtype.
    """
    if not (np.isfinite(record.latents).all() and np.isfinite(record.text).all()):
        problem = "the latents or the text embedding are not finite"
        raise InputError(f"{record.video}: {problem}; check the weights of the model")
    if len(record.text) > TEXT_LENGTH:
        raise ValueError(f"{record.video}: {len(record.text)} text tokens; expected at most {TEXT_LENGTH}")
    if record.latents.dtype != record.text.dtype:
        raise ValueError(f"{record.video}: the latents are {record.latents.dtype}, the text {record.text.dtype}")
    dtype: Any = record.latents.dtype.name
    features = make_features(dtype, record.latents.shape[-1], record.text.shape[-1])
    specs: Any = features.get_serialized_info()
    example = ExampleSerializer(specs).get_tf_example(features.encode_example(record._asdict()))
    return example.SerializeToString(deterministic=True)  # by default, the order of the fields is random


def write_shard(path: Path, records: Iterable[Record]) -> tuple[Shard, list[Entry]]:
    """Write the records, of which there may be none, completely or not at all.

    Raises:
        InputError: a value is not finite.
    """
    entries: list[Entry] = []
    with replacing(path) as scratch:
        writer = ArrayRecordWriter(str(scratch), "group_size:1")
        try:
            for record in records:
                writer.write(serialise(record))
                latents: Any = record.latents.shape
                entries.append(Entry(record.video, latents, len(record.text), record.fingerprint))
        except BaseException:
            with contextlib.suppress(Exception):  # on a full disk, closing fails too
                writer.close()
            raise
        writer.close()
        with open(scratch, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = scratch.stat().st_size
    return Shard(file=path.name, records=len(entries), bytes=size, sha256=digest), entries


def write_description(folder: Path, dtype: Dtype, channels: int, text_dim: int, shards: Sequence[Shard]) -> None:
    """Write the files that TFDS needs beside the shards: dataset_info.json and features.json."""
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(NAME, tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""),
        features=make_features(dtype, channels, text_dim),
    )
    info.set_file_format("array_record")
    place: Any = folder  # TFDS declares its own kind of path
    template = tfds.core.ShardedFileTemplate(
        data_dir=place, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    lengths, size = [shard.records for shard in shards], sum(shard.bytes for shard in shards)
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
    info.set_splits(SplitDict([split]))
    info.write_to_directory(folder)


def write_empty_prompt(folder: Path, text: Float[np.ndarray, "l d"]) -> None:
    with replacing(folder / EMPTY_PROMPT) as scratch:
        save_file({"text": np.ascontiguousarray(text)}, scratch)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    with replacing(folder / MANIFEST) as scratch:
        scratch.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        InputError: there is none, or it is damaged, or another version wrote it.
    """
    return read_model(Manifest, folder / MANIFEST)


def read_model(model: type[Model], file: Path, remedy: str = REMEDY) -> Model:
    """Read a JSON file of ours with a pydantic model.

    Args:
        remedy: what messages advise.

    Raises:
        InputError: there is no such file, or it does not fit the model.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; {remedy}")
    try:
        return model.model_validate_json(file.read_bytes())
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in problem["loc"])
        raise InputError(f"{file}: cannot be used ({place}{problem['msg']}); {remedy}") from None


def write_index(folder: Path, entries: Iterable[Entry]) -> None:
    with replacing(folder / INDEX) as scratch, scratch.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in entries)


def read_index(folder: Path) -> list[Entry]:
    """Read the index of a folder.

    Raises:
        InputError: there is none, or a line is damaged.
    """
    file = folder / INDEX
    if not file.is_file():
        raise InputError(f"{file}: no such file; {REMEDY}")
    entries = []
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                entries.append(_LINE.validate_json(line, strict=True))
            except pydantic.ValidationError:
                raise InputError(f"{file}:{number}: is not the line of a record; {REMEDY}") from None
    return entries
