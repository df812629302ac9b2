"""A trace of some training steps for the profiler."""

from collections.abc import Iterator

import jax

from tfm_jax import processes
from tfm_jax.errors import InputError
from tfm_jax.train.watching import About, Event, Watcher
from tfm_jax.wan.transformer import WanTransformer


class Profile(Watcher):
    """Writes a trace of the steps from `first` to `last` to profile/ in the folder of the run.

    Raises:
        InputError: `steps` is not of the form FIRST:LAST.
    """

    def __init__(self, steps: str):
        self._steps = steps
        first, _, last = steps.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise InputError(f"--profile={steps}: expected the first and the last step, such as 10:13")
        self._first, self._last = int(first), int(last)
        self._tracing = False

    def open(self, about: About) -> None:
        self._folder = about.output / "profile"
        if not about.first < self._first <= self._last <= about.last:
            runs = f"this run computes the steps {about.first + 1} to {about.last}"
            raise InputError(f"--profile={self._steps}: {runs}; expected some of them")

    def wants(self, step: int) -> bool:
        return step in (self._first - 1, self._last)

    def look(self, step: int, model: WanTransformer) -> Iterator[Event]:
        del model
        if step == self._last:
            self.close()
        else:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        yield from ()

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            processes.print_once(f"profile: {self._folder}")
