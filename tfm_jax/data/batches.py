"""Which clips a step trains on: a function of (seed, step) alone, whatever the number of processes."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Array, Float

from tfm_jax.data.records import Records
from tfm_jax.errors import InputError
from tfm_jax.wan.transformer import TEXT_LENGTH


class Batch(NamedTuple):
    """What a step trains on: read as numpy arrays, placed on the devices as jax arrays."""

    latents: Float[np.ndarray | Array, "b f h w c"]
    text: Float[np.ndarray | Array, "b l d"]
    """Zero-padded to 512 tokens."""


class Batches:
    """Shuffled clips, every clip once an epoch, each epoch in an order of its own; a batch may straddle two epochs.

    Raises:
        InputError: fewer clips than a batch has rows.
    """

    def __init__(self, records: Records, batch_size: int, seed: int):
        if batch_size > len(records):
            clips = f"{records.folder} has {len(records)} clips"
            raise InputError(f"train.batch_size={batch_size}: {clips}; expected at most as many rows as clips")
        self.records = records
        self.batch_size = batch_size
        self._order: Any = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat()

    def at(self, step: int, process_index: int = 0, process_count: int = 1) -> tuple[Batch, list[int]]:
        """The rows of step `step` (from 0) that are this process's, and the index of each one's record.

        The rows of all processes, put together in order, are the batch of one process.

        Raises:
            InputError: a record is damaged, or the processes cannot share the batch equally.
        """
        if self.batch_size % process_count:
            expected = f"expected a multiple of the {process_count} processes"
            raise InputError(f"train.batch_size={self.batch_size}: {expected}")
        rows = self.batch_size // process_count
        start = step * self.batch_size + process_index * rows
        clips = [int(self._order[row]) for row in range(start, start + rows)]
        records = [self.records[clip] for clip in clips]
        text = np.zeros((rows, TEXT_LENGTH, records[0].text.shape[1]), np.float32)
        for padded, record in zip(text, records, strict=True):
            padded[: len(record.text)] = record.text
        return Batch(np.stack([record.latents for record in records]), text), clips

    def iterate(
        self, start: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[int, Batch, list[int]]]:
        """`(step, *at(step))` for step = start, start + 1, ... without end; the next few are read ahead in threads."""
        steps = grain.MapDataset.range(start, sys.maxsize)
        read = steps.map(lambda step: (int(step), *self.at(int(step), process_index, process_count)))
        return iter(read.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
