"""Small records of prepared clips, and the folders that hold them."""

from pathlib import Path

import numpy as np

from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.data.records import Record, RecordWriter

METADATA = {"model": "weights/wan", "frames": 17, "fps": 16.0}
SHAPE, TEXT_DIM = (5, 4, 6, 16), 24
RECORD_BYTES = 4 * (int(np.prod(SHAPE)) + TEXT_LENGTH * TEXT_DIM)
"""The maximum size of a record, from which the number of records per shard follows."""


def make_records(count: int) -> list[Record]:
    rng = np.random.default_rng(0)
    return [
        Record(
            rng.normal(size=SHAPE).astype(np.float32),
            rng.normal(size=(1 + 3 * n, TEXT_DIM)).astype(np.float32),
            f"prompt {n}, 猫\0",
            f"clip {n}.mp4",
        )
        for n in range(count)
    ]


def write_records(folder: Path, count: int = 7) -> list[Record]:
    written = make_records(count)
    with RecordWriter(folder, METADATA) as writer:
        for record in written:
            writer.write(record)
    return written


def same(a: Record, b: Record) -> bool:
    return np.array_equal(a.latents, b.latents) and np.array_equal(a.text, b.text) and a[2:] == b[2:]


def shard(dataset: Path, number: int = 1) -> Path:
    return sorted(dataset.glob("*array_record*"))[number]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[1000] ^= 4
    file.write_bytes(content)
