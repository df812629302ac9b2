"""The order of the clips in training, and which clips are held out from it. Nothing here reads a clip."""

import collections
import functools
import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import grain


class Order:
    """Which clips the batch of a step contains: a function of the sizes, the batch size, the seed and the step only.

    The clips of one size form a bucket, and all clips of a batch are from one bucket. In every `len(sizes)` steps, each
    bucket gets as many batches as it has clips, in an order that the seed shuffles. The batches of a bucket go through
    epochs: each epoch contains every clip of the bucket once, in a new order, and a batch may span two epochs.
    """

    def __init__(self, sizes: Sequence[Hashable], batch_size: int, seed: int):
        self._sizes = sizes
        self._batch_size = batch_size
        self._buckets: dict[Hashable, list[int]] = {}
        for clip, size in enumerate(sizes):
            self._buckets.setdefault(size, []).append(clip)
        # The bucket of a step is that of the clip which would be next if every batch had one clip of any size.
        self._lead = _shuffled(len(sizes), seed)
        self._epochs = {size: _shuffled(len(clips), seed) for size, clips in self._buckets.items()}
        self._ranks = functools.lru_cache(maxsize=2)(self._rank_steps)

    def clips(self, step: int) -> list[int]:
        """Return the clips of the batch of `step`, counted from 0, row by row: indices into `sizes`."""
        cycle, place = divmod(step, len(self._sizes))
        size = self._size(step)
        clips, epochs = self._buckets[size], self._epochs[size]
        earlier = cycle * len(clips) + self._ranks(cycle)[place]  # number of batches that the bucket had before
        start = earlier * self._batch_size
        return [clips[int(epochs[row])] for row in range(start, start + self._batch_size)]

    def _size(self, step: int) -> Hashable:
        return self._sizes[int(self._lead[step])]

    def _rank_steps(self, cycle: int) -> list[int]:
        """Count, for each of the `len(sizes)` steps of a cycle, the earlier steps of the cycle with the same bucket."""
        counts = collections.Counter()
        ranks = []
        for step in range(cycle * len(self._sizes), (cycle + 1) * len(self._sizes)):
            size = self._size(step)
            ranks.append(counts[size])
            counts[size] += 1
        return ranks


def _shuffled(count: int, seed: int) -> Any:
    """Return the numbers below `count` in a random order, then in another one, and so on for ever."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def is_held_out(clip: str, fraction: float) -> bool:
    """Whether a clip is held out from training. All clips of a video are on the same side.

    The answer depends only on the name of the video, so other videos can be added or removed.
    """
    video = clip.partition("#t=")[0]
    digest = hashlib.blake2b(video.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
