"""Reads the pixels of clips in threads, ahead of the encoder."""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, Queue
from threading import Event
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8

from tfm_jax import video
from tfm_jax.config import ClipConfig
from tfm_jax.data.clips import Windows
from tfm_jax.data.survey import Surveyed
from tfm_jax.errors import InputError

Job = TypeVar("Job")
Item = TypeVar("Item")

THREADS = min(16, os.cpu_count() or 1)
"""Number of videos that are decoded at a time. Each of them holds up to two clips in memory."""

_END = object()


class Pixels(NamedTuple):
    """The pixels of a clip, and how records name the clip."""

    video: str
    pixels: UInt8[np.ndarray, "t y x 3"]


def read_clips(surveyed: Sequence[Surveyed], clip: ClipConfig) -> Generator[tuple[Surveyed, Pixels | InputError]]:
    """Yield the clips of the videos in order, each with its video. A damaged video ends with an error, which follows
    the clips before the damage.

    Args:
        surveyed: videos that give clips.
    """

    def read(entry: Surveyed) -> Iterator[Pixels]:
        windows, row = entry.chosen, entry.row
        assert isinstance(windows, Windows)
        clips = video.read_windows(row.path, windows.starts, *windows.bucket, clip.fps, clip.resize)
        yield from map(Pixels, windows.names(row.video), clips)

    return read_ahead(surveyed, read)


def read_ahead(
    jobs: Iterable[Job], read: Callable[[Job], Iterator[Item]], threads: int = THREADS
) -> Generator[tuple[Job, Item | InputError]]:
    """Yield every job with each of the items that `read` yields for it, in order. Threads read several jobs at a time.

    An InputError ends a job and is yielded like an item; any other exception is raised. The results that wait are
    bounded: at most one for each thread, and one more in the hands of the thread. When this iterator is closed or
    fails, the threads stop after the item that they are reading.
    """
    stopped = Event()

    def work(job: Job, results: Queue) -> None:
        try:
            for item in read(job):
                results.put(item)
                if stopped.is_set():
                    return
            results.put(_END)
        except BaseException as error:
            results.put(error)

    pool = ThreadPoolExecutor(threads)
    waiting = iter(jobs)
    active: deque[tuple[Job, Queue]] = deque()

    def start(count: int) -> None:
        for job in itertools.islice(waiting, count):
            active.append((job, Queue(1)))
            pool.submit(work, *active[-1])

    try:
        start(threads)
        while active:
            job, results = active[0]
            yield from ((job, item) for item in _results(results))
            active.popleft()
            start(1)
    finally:
        stopped.set()
        for _, results in active:  # a thread that waits for a free place can put its item there and sees the end
            with contextlib.suppress(Empty):
                results.get_nowait()
        pool.shutdown(cancel_futures=True)


def _results(results: Queue) -> Iterator:
    """Yield the results of a job until it ends."""
    while (item := results.get()) is not _END:
        if isinstance(item, BaseException) and not isinstance(item, InputError):
            raise item
        yield item
        if isinstance(item, InputError):
            return
