"""Which clips a step trains on: a function of (seed, step) alone, whatever the number of processes."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Array, Float

from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.data.records import Records
from tfm_jax.errors import InputError


class Batch(NamedTuple):
    """What a step trains on: read as numpy arrays, placed on the devices as jax arrays."""

    latents: Float[np.ndarray | Array, "b f h w c"]
    text: Float[np.ndarray | Array, "b l d"]
    """Zero-padded to 512 tokens."""


class Batches:
    """Shuffled clips, every clip once an epoch, each epoch in an order of its own; a batch may straddle two epochs.

    Args:
        rows: the rows of every batch that this process reads, ascending; None is all of them.

    Raises:
        InputError: fewer clips than a batch has rows.
    """

    def __init__(self, records: Records, batch_size: int, seed: int, rows: Sequence[int] | None = None):
        if batch_size > len(records):
            size = f"{records.folder} has only {len(records)} clips"
            expected = f"expected a batch size of at most {len(records)}"
            raise InputError(f"train.batch_size={batch_size}: {size}; {expected}")
        self.records = records
        self.batch_size = batch_size
        self.rows = range(batch_size) if rows is None else rows
        self._order: Any = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat()

    def at(self, step: int) -> tuple[Batch, list[int]]:
        """This process's rows of the batch of step `step` (from 0), and the records of all its rows, by index.

        Raises:
            InputError: a record is damaged or is not what was prepared.
        """
        start = step * self.batch_size
        clips = [int(self._order[row]) for row in range(start, start + self.batch_size)]
        records = [self.records[clips[row]] for row in self.rows]
        text = np.zeros((len(records), TEXT_LENGTH, records[0].text.shape[1]), np.float32)
        for padded, record in zip(text, records, strict=True):
            padded[: len(record.text)] = record.text
        return Batch(np.stack([record.latents for record in records]), text), clips

    def iterate(self, start: int = 0) -> Iterator[tuple[int, Batch, list[int]]]:
        """`(step, *at(step))` for step = start, start + 1, ... without end; the next few are read ahead in threads."""
        steps = grain.MapDataset.range(start, sys.maxsize)
        read = steps.map(lambda step: (int(step), *self.at(int(step))))
        return iter(read.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
