"""Training batches. Which clips a batch contains does not depend on the number of processes."""

import collections
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from tfm_jax.arrays import DTYPES, pad_text
from tfm_jax.data.order import Order
from tfm_jax.data.records import Records
from tfm_jax.errors import InputError
from tfm_jax.sharding import batch_sharding


class Batch(NamedTuple):
    """The input of one training step: NumPy arrays when read, JAX arrays once placed on the devices.

    They have the data type in which the clips are stored.
    """

    latents: Float[np.ndarray | Array, "b f h w c"]
    text: Float[np.ndarray | Array, "b l d"]
    """Zero-padded to the `text_len` of the transformer."""


class Batches:
    """Batches of shuffled clips. `Order` describes the order; all clips of a batch have latents of the same shape.

    For given clips and batch size, a batch depends only on the seed and the step.

    Args:
        text_len: number of tokens to which the text is padded. No prompt has more.
        clips: indices of the records to draw from; all by default.
        caption_dropout: probability with which a row of a batch gets the empty prompt instead of its own.

    Raises:
        InputError: there are fewer clips than a batch has rows.
    """

    def __init__(
        self, records: Records, batch_size: int, seed: int, mesh: Mesh, text_len: int, *,
        clips: Sequence[int] | None = None, caption_dropout: float = 0.0,
    ):  # fmt: skip
        self.clips = range(len(records)) if clips is None else clips
        if batch_size > len(self.clips):
            size = f"{records.folder} has only {len(self.clips)} clips to choose from"
            expected = f"expected at most {len(self.clips)} clips per step"
            raise InputError(f"train.batch_size x train.accumulate = {batch_size}: {size}; {expected}")
        self.records = records
        self.batch_size = batch_size
        self.rows: Sequence[int] = _local_rows(batch_size, mesh)
        """The rows of a batch that the devices of this process hold, in ascending order. Only these are read."""
        self._seed = seed
        self._caption_dropout = caption_dropout
        self._mesh = mesh
        self._text_len = text_len
        self._order = Order([records.index[clip].latents for clip in self.clips], batch_size, seed)

    @property
    def buckets(self) -> dict[tuple[int, ...], int]:
        """The shapes of the latents, and the number of clips of each, the most frequent first."""
        return dict(collections.Counter(self.records.index[clip].latents for clip in self.clips).most_common())

    def read(self, step: int) -> tuple[Batch, list[int]]:
        """Read this process's rows of the batch of `step`, counted from 0.

        Returns:
            The rows, and the indices of the records of the whole batch, row by row.

        Raises:
            InputError: a record is damaged, or differs from the one that was prepared.
        """
        clips = [self.clips[number] for number in self._order.clips(step)]
        dropped = self._dropped(step)
        records = [self.records[clips[row]] for row in self.rows]
        prompts = [
            self.records.empty_prompt if dropped[row] else record.text
            for row, record in zip(self.rows, records, strict=True)
        ]
        return Batch(np.stack([record.latents for record in records]), pad_text(prompts, self._text_len)), clips

    def _dropped(self, step: int) -> Bool[np.ndarray, "b"]:
        """Choose the rows of a whole batch that get the empty prompt."""
        return np.random.default_rng([self._seed, step]).random(self.batch_size) < self._caption_dropout

    def iterate(self, start: int = 0) -> Iterator[tuple[int, Batch, list[int]]]:
        """Yield `(step, *read(step))` for step = start, start + 1, ... for ever. Threads read a few steps ahead."""
        steps = grain.MapDataset.range(start, sys.maxsize)
        batches = steps.map(lambda step: (int(step), *self.read(int(step))))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def abstract(self, latents: tuple[int, ...]) -> Batch:
        """Return a placed batch of clips whose latents have this shape, with abstract arrays instead of values."""
        shapes = (latents, (self._text_len, self.records.text_dim))
        dtype, sharding = DTYPES[self.records.manifest.dtype], batch_sharding(self._mesh)
        arrays: Any = [jax.ShapeDtypeStruct((self.batch_size, *s), dtype, sharding=sharding) for s in shapes]
        return Batch(*arrays)

    def place(self, batch: Batch) -> Batch:
        """Make global JAX arrays, split over the devices of all processes, from the rows of this process."""
        return _place(batch, self.batch_size, self.rows, self._mesh)


def read_clips(records: Records, clips: Sequence[int], mesh: Mesh, text_len: int) -> Batch:
    """Return a batch of the records with these indices, split over the devices of all processes.

    The number of clips must be a multiple of the number of parts of a batch, and their latents must have one shape.

    Raises:
        InputError: a record is damaged, or differs from the one that was prepared.
    """
    rows = _local_rows(len(clips), mesh)
    read = [records[clips[row]] for row in rows]
    text = pad_text([record.text for record in read], text_len)
    batch = Batch(np.stack([record.latents for record in read]), text)
    return _place(batch, len(clips), rows, mesh)


def _place(batch: Batch, batch_size: int, rows: Sequence[int], mesh: Mesh) -> Batch:
    """Make global JAX arrays of `batch_size` rows from the `rows` of this process."""

    def place(values: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = range(*index[0].indices(batch_size))
            start = rows.index(wanted.start)
            return values[(slice(start, start + len(wanted)), *index[1:])]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), batch_sharding(mesh), part)

    return Batch(*(place(np.asarray(values)) for values in batch))


def _local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Return the rows of a batch that the devices of this process hold, in ascending order."""
    parts: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(batch_size))})
