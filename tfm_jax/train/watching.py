"""What watches a run: the interface of watchers, and how the training loop reports to them.

The loop knows only this interface. The console, the files of a run, TensorBoard, W&B, validation, samples and the
profiler are watchers (`watchers.py`). To add one:

    class Stopwatch(Watcher):
        def on_event(self, event):
            if event.kind == "step":
                print(event.step, event.values["seconds"])

    train(run, watchers=[Stopwatch()])
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tfm_jax import processes
from tfm_jax.errors import NonFiniteLoss
from tfm_jax.train.speed import Speed
from tfm_jax.wan.transformer import WanTransformer

MAX_CLIPS_SHOWN = 8
"""Messages name at most this many clips of a bad step; metrics.jsonl names all of them."""


class Event(NamedTuple):
    """Something that happened in a run.

    | kind | when | values |
    |---|---|---|
    | started, resumed | before the first step | |
    | step | after a step, one step late | what metrics.jsonl has: loss, its terms, grad_norm, seconds, ... |
    | skipped | after a bad step, one step late | the same, and `clips` (names), `reason` |
    | checkpoint | a checkpoint is being saved | |
    | validation | after an evaluation | what validation.jsonl has: model, loss, by_level, clips |
    | samples | after sampling | `folder` of the videos |
    | stopped | before the last step | `reason`: the name of a signal, or why training diverged |
    | finished | after the last step | |
    """

    kind: str
    step: int
    """Number of steps done when it happened."""
    values: Mapping[str, Any] = MappingProxyType({})


class About(NamedTuple):
    """What watchers are told about a run before its first step."""

    output: Path
    first: int
    """Number of steps that were done before, by an interrupted run."""
    last: int
    """Number of steps of the whole run."""
    clips_per_step: int
    config: Mapping[str, Any] = MappingProxyType({})
    """The configuration: section -> field -> value."""
    mesh: Mesh | None = None


class Watcher:
    """Watches a run. Override the methods that you need; these do nothing.

    An exception in a watcher ends the run. In a run of several processes, every process has its own watchers.
    """

    def open(self, about: About) -> None:
        """Called in every process, before the first step."""

    def on_event(self, event: Event) -> None:
        """Called for every event, in the first process only."""

    def wants(self, step: int) -> bool:
        """Whether `look` is to be called after this step. The answer must be the same in all processes."""
        del step
        return False

    def look(self, step: int, model: WanTransformer) -> Iterable[Event]:
        """Use the model after a step, while training waits. Called in every process, before the first step, too.

        The weights are those of the run, on its mesh (compute inside `jax.set_mesh(about.mesh)`), and valid only
        during the call.

        Returns:
            Events to tell all watchers.
        """
        del step, model
        return ()

    def close(self) -> None:
        """Called in every process at the end of the run, also after an error, if `open` was called."""


class Reports:
    """Tells watchers what happens in a run. Use this class as a context manager, which opens and closes the watchers.

    Reports of steps are passed on one step late, so that the devices never wait for the host. `bad_steps` in the report
    of a step is the number of bad steps in a row up to that step, so the step is bad if the number is above 0. If a
    report has no `bad_steps`, the step is bad if one of its values is not finite.

    Args:
        max_bad_steps: number of bad steps in a row that ends the run.
        clip_name: maps the index of a clip to its name.
        speed: measures the speed of the steps, if given.
    """

    def __init__(
        self, watchers: Sequence[Watcher], about: About, max_bad_steps: int = 1,
        clip_name: Callable[[int], str] = str, speed: Speed | None = None,
    ):  # fmt: skip
        self._watchers = watchers
        self._about = about
        self._max_bad_steps = max_bad_steps
        self._clip_name = clip_name
        self._speed = speed
        self._pending: tuple[int, Mapping[str, Any], Sequence[int], int, float] | None = None
        self._closing = contextlib.ExitStack()

    def add(
        self, step: int, report: Mapping[str, Any], clips: Sequence[int], flops: int = 0, data_wait: float = 0.0
    ) -> None:
        """Accept the report of a step, which the devices may still be computing, and pass on that of the previous step.

        Args:
            flops: number of floating-point operations of the step, over all devices.
            data_wait: seconds that the step waited for its clips.

        Raises:
            NonFiniteLoss: the last `max_bad_steps` steps up to the previous one were bad. `flush` can still pass on
                the new report.
        """
        before, self._pending = self._pending, (step, report, clips, flops, data_wait)
        if before:
            self._pass_on(*before)

    def flush(self) -> None:
        """Pass on the last report that `add` accepted.

        Raises:
            NonFiniteLoss: the last `max_bad_steps` steps were bad.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._pass_on(*pending)

    def tell(self, event: Event) -> None:
        """Tell the watchers of an event."""
        if processes.is_first():
            for watcher in self._watchers:
                watcher.on_event(event)

    def wants_look(self, step: int) -> bool:
        """Whether a watcher wants to look at the model after this step."""
        return any(watcher.wants(step) for watcher in self._watchers)

    def look(self, step: int, model: Callable[[], WanTransformer]) -> None:
        """Let the watchers look at the model that want to after this step. Flush the reports before."""
        for watcher in self._watchers:
            if watcher.wants(step):
                for event in watcher.look(step, model()):
                    self.tell(event)
                self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count the time since the last report as that of the next step."""
        if self._speed:
            self._speed.restart()

    def _pass_on(
        self, step: int, report: Mapping[str, Any], clips: Sequence[int], flops: int, data_wait: float
    ) -> None:
        arrays = jax.device_get(dict(report))  # waits for the step
        values = {name: np.asarray(arrays[name], np.float64).tolist() for name in sorted(arrays, key=_loss_first)}
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        bad_steps = int(values.pop("bad_steps", not all(map(math.isfinite, numbers.values()))))
        if self._speed:
            values |= self._speed.measure(flops, data_wait)
        if not bad_steps:
            self.tell(Event("step", step, values))
            return
        names = [self._clip_name(clip) for clip in clips]
        reason = _reason(numbers, names)
        self.tell(Event("skipped", step, values | {"clips": names, "reason": reason}))
        if bad_steps >= self._max_bad_steps:
            raise NonFiniteLoss(f"step {step}: {reason} (bad steps in a row: {bad_steps})")

    def __enter__(self) -> "Reports":
        with contextlib.ExitStack() as opened:
            for watcher in self._watchers:
                watcher.open(self._about)
                opened.callback(watcher.close)
            self._closing = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A line that could not be written is still in the buffer, and closing the file tries to write it again. A
        # second failure must not replace the first exception.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._closing.close()


def _loss_first(name: str) -> bool:
    return name != "loss"


def _reason(numbers: Mapping[str, float], clips: Sequence[str]) -> str:
    """Say what is wrong with a bad step."""
    reasons = [f"the {name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
    shown = ", ".join(clips[:MAX_CLIPS_SHOWN])
    more = f" and {len(clips) - MAX_CLIPS_SHOWN} more" if len(clips) > MAX_CLIPS_SHOWN else ""
    return f"{' and '.join(reasons) or 'the update is not finite'}; clips of this step: {shown}{more}"
