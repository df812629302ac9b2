"""Training batches. Which clips a batch contains does not depend on the number of processes."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tfm_jax.arrays import pad_text
from tfm_jax.data.records import Records
from tfm_jax.errors import InputError
from tfm_jax.sharding import batch_sharding


class Batch(NamedTuple):
    """The input of one training step: NumPy arrays when read, JAX arrays once placed on the devices."""

    latents: Float[np.ndarray | Array, "b f h w c"]
    text: Float[np.ndarray | Array, "b l d"]
    """Zero-padded to 512 tokens."""


class Batches:
    """Batches of shuffled clips. Each epoch contains every clip once, in a new order; a batch may span two epochs.

    For given records and batch size, the clips of a batch depend only on the seed and the step.

    `rows` are the rows of a batch that the devices of this process hold, in ascending order. Only these are read.

    Raises:
        InputError: there are fewer clips than a batch has rows.
    """

    def __init__(self, records: Records, batch_size: int, seed: int, mesh: Mesh):
        if batch_size > len(records):
            size = f"{records.folder} has only {len(records)} clips"
            expected = f"expected at most {len(records)} clips per step"
            raise InputError(f"train.batch_size x train.accumulate = {batch_size}: {size}; {expected}")
        self.records = records
        self.batch_size = batch_size
        self.rows: Sequence[int] = _local_rows(batch_size, mesh)
        self._sharding = batch_sharding(mesh)
        self._order: Any = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat()

    def read(self, step: int) -> tuple[Batch, list[int]]:
        """Read this process's rows of the batch of `step`, counted from 0.

        Returns:
            The rows, and the indices of the records of the whole batch, row by row.

        Raises:
            InputError: a record is damaged, or differs from the one that was prepared.
        """
        start = step * self.batch_size
        clips = [int(self._order[row]) for row in range(start, start + self.batch_size)]
        records = [self.records[clips[row]] for row in self.rows]
        latents = np.stack([record.latents for record in records])
        return Batch(latents, pad_text([record.text for record in records])), clips

    def iterate(self, start: int = 0) -> Iterator[tuple[int, Batch, list[int]]]:
        """Yield `(step, *read(step))` for step = start, start + 1, ... for ever. Threads read a few steps ahead."""
        steps = grain.MapDataset.range(start, sys.maxsize)
        batches = steps.map(lambda step: (int(step), *self.read(int(step))))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def place(self, batch: Batch) -> Batch:
        """Make global JAX arrays, split over the devices of all processes, from the rows of this process."""

        def place(values: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                wanted = range(*index[0].indices(self.batch_size))
                start = self.rows.index(wanted.start)
                return values[(slice(start, start + len(wanted)), *index[1:])]

            return jax.make_array_from_callback((self.batch_size, *values.shape[1:]), self._sharding, part)

        return Batch(*(place(np.asarray(values)) for values in batch))


def _local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Return the rows of a batch that the devices of this process hold, in ascending order."""
    parts: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(batch_size))})
