"""Small records of prepared clips, and the folders that hold them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tfm_jax.arrays import DTYPES, Dtype
from tfm_jax.data import format as files
from tfm_jax.data.format import Manifest, Record

CLIP = {"frames": 17, "height": 32, "width": 48}
SHAPE, TEXT_DIM = (5, 4, 6, 16), 24


def make_records(count: int, shapes: Sequence[tuple[int, ...]] = (SHAPE,), dtype: Dtype = "float32") -> list[Record]:
    """Draw records whose latents have these shapes in turns."""
    rng = np.random.default_rng(0)
    return [
        Record(
            rng.normal(size=shapes[n % len(shapes)]).astype(DTYPES[dtype]),
            rng.normal(size=(1 + 3 * n, TEXT_DIM)).astype(DTYPES[dtype]),
            f"prompt {n}, 猫\0",
            f"clip {n}.mp4",
        )
        for n in range(count)
    ]


def write_records(folder: Path, count: int = 7) -> list[Record]:
    written = make_records(count)
    write_dataset(folder, written)
    return written


def write_dataset(
    folder: Path,
    records: Sequence[Record],
    clip: Mapping[str, Any] | None = None,
    encoders: Mapping[str, str] | None = None,
    per_shard: int = 3,
) -> None:
    """Write a folder of prepared clips as tfm-prepare does, in their dtype.

    Args:
        clip: the section of the configuration; CLIP by default.
        encoders: the fingerprints of the encoders; of none by default.
        per_shard: number of records in each shard.
    """
    folder.mkdir(parents=True)
    groups = [records[start : start + per_shard] for start in range(0, len(records), per_shard)]
    written = [
        files.write_shard(folder / files.shard_name(number, len(groups)), group) for number, group in enumerate(groups)
    ]
    shards = [shard for shard, _ in written]
    text = records[0].text
    dtype: Any = text.dtype.name
    files.write_description(folder, dtype, records[0].latents.shape[-1], text.shape[-1], shards)
    files.write_index(folder, [entry for _, entries in written for entry in entries])
    files.write_empty_prompt(folder, np.full_like(text[:2], 0.5))
    manifest = Manifest(
        encoders=dict(encoders or {}),
        dtype=dtype,
        clip=dict(CLIP if clip is None else clip),
        data_seed=0,
        model="weights/wan",
        clips="0123456789abcdef",
        shards=shards,
    )
    files.write_manifest(folder, manifest)


def read_dataset(folder: Path) -> list[Record]:
    """Read all records of a folder with TFDS alone."""
    source = tfds.builder_from_directory(folder).as_data_source(split="train")
    return [
        Record(fields["latents"], fields["text"], fields["prompt"].decode(), fields["video"].decode())
        for fields in source
    ]


def same(a: Record, b: Record) -> bool:
    return np.array_equal(a.latents, b.latents) and np.array_equal(a.text, b.text) and a[2:] == b[2:]


def shard(dataset: Path, number: int = 1) -> Path:
    return sorted(dataset.glob("*array_record*"))[number]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[1000] ^= 4
    file.write_bytes(content)
