"""The training loop of both stages, which a restart continues from the last checkpoint with the same result."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tfm_jax import interrupts
from tfm_jax.checkpoint import Checkpoints, flatten, unflatten
from tfm_jax.errors import InputError, StoppedEarly
from tfm_jax.train.metrics import Console, MetricsFile
from tfm_jax.train.watching import About, Reports

SECONDS_BETWEEN_CHECKPOINTS = 120.0

StepFn = Callable[[Any, Any], tuple[Any, dict[str, Any]]]
"""Maps the state and a batch to the new state and the metrics of the step. The step's random numbers come from keys in
the batch, so they do not depend on when the training was interrupted."""


class Batch(NamedTuple):
    """The arrays of a step, and the numbers of its clips for the log."""

    arrays: Any
    clips: Sequence[int]


class Stage(NamedTuple):
    """The files of a stage, and what its result depends on."""

    name: str
    output: Path
    settings: str
    """A description of everything that the result depends on. A checkpoint with another description is refused."""
    batch_size: int
    log_every: int

    @property
    def log(self) -> Path:
        """JSON Lines file with the metrics of every step."""
        return self.output / f"{self.name}.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.output / "checkpoints" / self.name


def fit(stage: Stage, step_fn: StepFn, state: Any, batch_of: Callable[[int], Batch], steps: int) -> Any:
    """Run `steps` steps from the last checkpoint of the stage or, without one, from `state`.

    Args:
        state: the initial state, a pytree of arrays.
        batch_of: maps the number of a step, from 0, to its batch. It must not depend on earlier calls.

    Returns:
        The state after the last step.

    Raises:
        InputError: the checkpoint was written with other settings.
        StoppedEarly: a signal stopped the training, after it had saved a checkpoint.
        NonFiniteLoss: a value is not finite.
    """

    def make_target(metadata: dict[str, Any]) -> dict[str, Any]:
        if metadata["settings"] != stage.settings:
            raise InputError(f"{stage.checkpoints}: from other settings; expected a new folder or the same settings")
        return flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))

    with (
        interrupts.postponed("saving a checkpoint after this step"),
        Checkpoints(stage.checkpoints, max_to_keep=1) as checkpoints,
    ):
        restored = checkpoints.restore(make_target)
        done = 0
        if restored is not None:
            done, state = restored.step, unflatten(state, restored.arrays)
            print(f"{stage.name}: continuing after step {done} of {steps}", flush=True)
        saved = time.monotonic()
        watchers = [MetricsFile(stage.log), Console(stage.log_every)]
        with Reports(watchers, About(stage.output, done, steps, stage.batch_size)) as reports:
            while done < steps:
                batch = batch_of(done)
                state, report = step_fn(state, batch.arrays)
                done += 1
                reports.add(done, report, batch.clips)
                stop = interrupts.requested()
                if stop or done == steps or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    reports.flush()
                    checkpoints.save(done, flatten(state), {"settings": stage.settings})
                    saved = time.monotonic()
                if stop and done < steps:
                    raise StoppedEarly(f"{stage.name}: {stop} after step {done}; run the same command to continue")
    return state
