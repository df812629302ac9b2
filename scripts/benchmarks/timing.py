"""Time programs that take turns, so that whatever else the machine does slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Program = Callable[[], object]
"""Does the work once, and returns only when it is done."""

WARM_UP = 1
LEAST_ROUNDS = 3


class Row(NamedTuple):
    """A figure of ours beside that of a peer."""

    subject: str
    case: str
    """What is done, and its size."""
    ours: str
    """Which of our ways, or "" if there is one way."""
    seconds: float
    peer: str
    peer_seconds: float
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer ours is."""
        return self.peer_seconds / self.seconds

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What stays the same from run to run."""
        return self.subject, self.case, self.ours, self.peer


def take_turns(programs: Mapping[str, Program], budget: float) -> dict[str, float]:
    """Return the median time of each program in seconds.

    All programs run once per round. The rounds after the warm-up are timed, at least `LEAST_ROUNDS` of them, and more
    until `budget` seconds have passed.
    """
    for _ in range(WARM_UP):
        for run in programs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in programs}
    end, rounds = time.perf_counter() + budget, 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name, run in programs.items():
            times[name].append(seconds_of(run))
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_of(run: Program) -> float:
    """Return how long one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def pair(subject: str, case: str, times: Mapping[str, float], ours: Sequence[str], peers: Sequence[str]) -> list[Row]:
    """Return a row for each of our ways beside each peer. `times` has the seconds of all of them by name."""
    return [Row(subject, case, name, times[name], peer, times[peer]) for name in ours for peer in peers]


def race(subject: str, case: str, ours: Program, peer: str, theirs: Program, budget: float) -> Row:
    """Time one program of ours beside one of a peer."""
    times = take_turns({"": ours, peer: theirs}, budget)
    return pair(subject, case, times, [""], [peer])[0]
