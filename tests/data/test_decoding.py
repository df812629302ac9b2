"""Decoding ahead of the encoder: the order, the bound on memory, errors, and a clean end."""

import threading
import time
from collections.abc import Iterator

import pytest

from tfm_jax.data.decoding import read_ahead
from tfm_jax.errors import InputError


class Reading:
    """Counts the items that have been read but not yet taken."""

    def __init__(self, items: int):
        self.items, self.waiting, self.most = items, 0, 0
        self._lock = threading.Lock()

    def read(self, job: int) -> Iterator[tuple[int, int]]:
        for number in range(self.items):
            with self._lock:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
            yield job, number

    def taken(self) -> None:
        with self._lock:
            self.waiting -= 1


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_order():
    """The first jobs take longest."""

    def read(job: int) -> Iterator[int]:
        time.sleep(0.02 * (5 - job))
        yield from range(job)

    found = list(read_ahead(range(5), read, threads=3))
    assert found == [(job, number) for job in range(5) for number in range(job)]


@pytest.mark.parametrize(("jobs", "items"), [(10, 1), (100, 1), (2, 100)])
def test_few_items_wait_however_many_there_are(jobs, items):
    reading = Reading(items)
    count = 0
    for _ in read_ahead(range(jobs), reading.read, threads=3):
        if count < 10:
            time.sleep(0.02)  # the threads read as far as they may
        reading.taken()
        count += 1
    assert count == jobs * items
    assert 3 <= reading.most <= 2 * 3 + 1


def test_an_input_error_ends_its_job_only():
    def read(job: int) -> Iterator[int]:
        yield job
        if job == 1:
            raise InputError("damaged")
        yield 10 * job

    found = [(job, str(item)) for job, item in read_ahead(range(3), read, threads=2)]
    assert found == [(0, "0"), (0, "0"), (1, "1"), (1, "damaged"), (2, "2"), (2, "20")]


def test_other_errors_are_raised():
    def read(job: int) -> Iterator[int]:
        yield job // (1 - job)

    with pytest.raises(ZeroDivisionError):
        list(read_ahead(range(100), read, threads=2))


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_stops_the_threads(taken):
    """Most of them wait for a free place at that moment."""
    reading = Reading(1000)
    found = read_ahead(range(1000), reading.read, threads=4)
    for _ in range(taken):
        next(found)
    time.sleep(0.05)
    found.close()
    assert reading.waiting <= 20


def test_an_interruption_of_the_consumer_stops_the_threads():
    reading = Reading(1000)

    def consume() -> None:
        for _ in read_ahead(range(1000), reading.read, threads=4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
