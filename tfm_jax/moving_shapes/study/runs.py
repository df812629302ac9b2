"""Runs a study or its pilot: trains every arm with every seed, and samples and measures it after several lengths.

Each part calls the code of the corresponding program, and all parts run in one process.
"""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfm_jax import config as configs
from tfm_jax.checkpoint import Checkpoints
from tfm_jax.errors import NonFiniteLoss, StoppedEarly
from tfm_jax.files import lock
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.clips import World, make_world
from tfm_jax.moving_shapes.study.cost import latest_costs, measure_cost
from tfm_jax.moving_shapes.study.measuring import measure_autoencoder, measure_order, measure_samples
from tfm_jax.moving_shapes.study.plan import Run, Study, check, pilot_runs, pilot_settings, planned_runs, settings
from tfm_jax.moving_shapes.study.power import foresee
from tfm_jax.moving_shapes.study.results import Record, Results
from tfm_jax.train.export import export
from tfm_jax.train.loop import train
from tfm_jax.train.run import TrainRun


def run_study(study: Study) -> Results:
    """Run everything that is not yet in the results file.

    The results file is enough to continue, on any machine. Several processes may run the same study at once; each of
    them returns when the study is complete.

    Raises:
        InputError: the settings are invalid or differ from those of the started study, or the model is missing.
        StoppedEarly: Ctrl-C or SIGTERM stopped the study.
    """
    check(study)
    results = Results(study.results, settings(study))
    pilot = Results(study.pilot_results, pilot_settings(study))
    with _stops_early(list(planned_runs(study)), results):
        with lock(study.output / "locks" / "start", wait=True):
            worlds = {law: make_world(study, law) for law in study.size.laws}
            results.reload()
            if not results.one("power"):
                _state_power(study, pilot, results)
            for law, world in worlds.items():
                if not results.one("real", law=law):
                    results.add("real", law=law, **measure_autoencoder(study, law, world))
            if not set(study.size.arms) <= latest_costs(results).keys():
                results.add("cost", seconds=_costs(study, worlds[study.size.laws[0]]))
        _run_missing(study, planned_runs, worlds, results)
    return results


def run_pilot(study: Study) -> Results:
    """Run the part of the pilot that is not yet in its results file. It is continued and stopped like the study."""
    check(study)
    results = Results(study.pilot_results, pilot_settings(study))
    with _stops_early(list(pilot_runs(study)), results):
        with lock(study.output / "locks" / "start", wait=True):
            worlds = {law: make_world(study, law) for law in study.size.laws}
        _run_missing(study, pilot_runs, worlds, results)
    return results


@contextlib.contextmanager
def _stops_early(runs: list[Run], results: Results) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a message that says how to continue."""
    try:
        yield
    except (StoppedEarly, KeyboardInterrupt):
        done = sum(run.is_done(results) for run in runs)
        raise StoppedEarly(
            f"stopped: {done} of {len(runs)} runs are done; to continue, run the same command again"
        ) from None


def _state_power(study: Study, pilot: Results, results: Results) -> None:
    """Record and print the smallest detectable differences, before the first run."""
    differences = foresee(study, pilot)
    results.add("power", differences=differences)
    if not differences:
        print(f"note: {pilot.file} has no runs of these lengths, so no smallest detectable difference can be stated")
    for each in differences:
        where = f"{each['law']}, {each['steps']} steps, {each['metric']}"
        print(f"{where}: the smallest detectable difference is {each['smallest']:.3g}", flush=True)


def _costs(study: Study, world: World) -> dict[str, list[float]]:
    print("measuring the cost of a step of every arm", flush=True)
    run = _train_run(study, study.find_run(study.size.laws[0], protocol.BASELINE, 0), world)
    seconds = measure_cost(run, {arm: study.objective(arm) for arm in study.size.arms}, study.size.rounds)
    return {arm: [round(second, 5) for second in each] for arm, each in seconds.items()}


# --- One run ---------------------------------------------------------------------------------------------------------


def _run_missing(
    study: Study, plan: Callable[[Study], Iterable[Run]], worlds: dict[str, World], results: Results
) -> None:
    for wait in (False, True):  # first run what no other process is running, then wait for the rest
        for run in plan(study):
            with lock(study.output / "locks" / f"{run.law}_{run.name.replace('/', '_')}", wait=wait) as mine:
                results.reload()
                if mine and not run.is_done(results):
                    print(f"{run.law}, {run.arm}, seed {run.seed}, rate {run.learning_rate:g}", flush=True)
                    _run(study, run, worlds[run.law], results)


def _run(study: Study, run: Run, world: World, results: Results) -> None:
    """Train, then export, sample and measure after each length, and add a record for each."""
    folder = study.folder(run)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[name] = round(time.perf_counter() - start, 2)
        return result

    def measure(steps: int) -> Record:
        lora = None
        if run.arm != protocol.BASE:
            lora = folder / f"step{steps}.safetensors"
            lora.unlink(missing_ok=True)
            export(folder, lora, "comfy", np.dtype(np.float32), steps)
        samples = study.samples(run, steps)
        record = {"metrics": timed("sample", lambda: measure_samples(study, world, lora, run.seed, samples))}
        if steps == run.lengths[-1]:
            record["sensitivity"] = timed("sensitivity", lambda: measure_order(study, world, lora))
        return record

    diverged = timed("train", lambda: _train(study, run, world)) if run.arm != protocol.BASE else None
    for steps in run.lengths:
        if not results.one("run", **run.keys, steps=steps):
            record = {"diverged": diverged} if diverged and not _reached(folder, steps) else measure(steps)
            results.add("run", **run.keys, steps=steps, **record, seconds=seconds)
            seconds = {}
    _clean(folder, everything=run.seed != 0)


def _train(study: Study, run: Run, world: World) -> str | None:
    """Train, from the newest checkpoint if there is one; return how the run diverged, if it did."""
    try:
        train(_train_run(study, run, world), resume=True)
    except NonFiniteLoss as error:
        return str(error)
    return None


def _train_run(study: Study, run: Run, world: World) -> TrainRun:
    """Return a training with checkpoints after all lengths, among others."""
    every = math.gcd(*run.lengths)
    return TrainRun(
        model=study.run.model,
        clip=study.run.clip,
        data=configs.DataConfig(path=world.latents),
        train=dataclasses.replace(
            study.run.train,
            output=study.folder(run),
            steps=run.lengths[-1],
            epochs=None,
            seed=run.seed,
            accumulate=1,
            checkpoint_every=every,
            keep_checkpoints=run.lengths[-1] + 1,  # all
            keep_every=None,
            log_every=every,
        ),
        lora=study.run.lora,
        objective=study.objective(run.arm),
        # With a falling learning rate, the first lengths would not be trainings of their own.
        optimizer=dataclasses.replace(study.run.optimizer, learning_rate=run.learning_rate, schedule="constant"),
    )


def _reached(folder: Path, steps: int) -> bool:
    """Whether a training that diverged did so after these steps."""
    return steps in Checkpoints(folder / "checkpoints").steps


def _clean(folder: Path, everything: bool) -> None:
    """Remove the files of a measured run, or only its checkpoints. The report shows samples of seed 0."""
    shutil.rmtree(folder if everything else folder / "checkpoints", ignore_errors=True)
