"""A training run: prepare it from a configuration, restore the newest checkpoint, and train."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from tfm_jax import config as configs
from tfm_jax import files, interrupts, processes
from tfm_jax.checkpoint import Arrays, Checkpoints, fingerprints, flatten, unflatten
from tfm_jax.data.batches import Batches
from tfm_jax.errors import CompilerError, InputError, NonFiniteLoss, StoppedEarly, Terminated
from tfm_jax.flops import training_flops
from tfm_jax.lora.adapters import attach_lora, check_lora, init_lora, load_adapters, split_lora
from tfm_jax.lora.files import Lora, read_lora
from tfm_jax.sharding import check_batch, make_mesh
from tfm_jax.train.data import check_widths, describe_shape, open_batches
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.train.run import TrainRun, check_same_run, config_dict
from tfm_jax.train.speed import Speed
from tfm_jax.train.step import Step, TrainState, init_state, make_step, run_keys
from tfm_jax.train.watchers import configured_watchers
from tfm_jax.train.watching import About, Event, Reports, Watcher
from tfm_jax.wan import load_base
from tfm_jax.wan.transformer import WanTransformer, token_grid


class _Setup(NamedTuple):
    """Everything that a run needs, built by `_prepare`."""

    mesh: Mesh
    steps: int
    """Number of optimizer steps of the whole run."""
    batches: Batches
    watchers: Sequence[Watcher]
    graph: nnx.GraphDef
    frozen: nnx.State
    initial_state: TrainState
    state_sharding: TrainState
    step: Step
    flops_of: Callable[[tuple[int, ...]], int]
    """Shape of the latents of a clip -> number of operations of a step, without those that are repeated."""
    metadata: dict[str, Any]
    """The configuration, and the fingerprints of the base weights and the data. It is saved with every checkpoint and
    compared when a run is resumed."""

    def model(self, state: TrainState) -> WanTransformer:
        """Return the model with its present adapters. It shares the arrays of the run."""
        return nnx.merge(self.graph, state.lora, self.frozen)


def train(run: TrainRun, resume: bool = False, watchers: Sequence[Watcher] = ()) -> None:
    """Train a LoRA, and write config.yaml, metrics.jsonl, checkpoints/ and more to `run.train.output`.

    With `resume`, training continues from the newest undamaged checkpoint, exactly as if it had not been interrupted,
    or starts from step 0 if there is no checkpoint. In a run of several processes (`tfm_jax.processes`), every process
    calls this with the same arguments, on a shared filesystem.

    Args:
        watchers: see `tfm_jax.train.watching`; in addition to those that the configuration asks for.

    Raises:
        InputError: an input is missing or damaged, inputs do not fit together, results would be overwritten, or
            another run is using the folder.
        NonFiniteLoss: training diverged.
        CompilerError: the training step could not be compiled.
        StoppedEarly: Ctrl-C or SIGTERM stopped the run before its last step.
    """
    settings, output = run.train, run.train.output
    files.check_output_directory("train.output", output)
    length = f"{settings.steps} steps" if settings.steps else f"{settings.epochs} epochs"
    times = f" x {settings.accumulate}" if settings.accumulate > 1 else ""
    processes.print_once(f"training a LoRA in {output}: {length}, batches of {settings.batch_size}{times}")
    with contextlib.ExitStack() as stack:
        with _stop_on_signal():
            setup = stack.enter_context(_prepared_in_folder(run, resume, watchers))
            first, state = _restore(run, setup)
            if first >= setup.steps:
                needed = f"train.epochs={settings.epochs} needs {setup.steps}"
                asked = needed if settings.epochs else f"train.steps={settings.steps}"
                processes.print_once(f"{output} is complete: it has {first} steps, and {asked}")
                return
            step = _compile(setup, state)
        _loop(run, setup._replace(step=step), state, first)


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into `StoppedEarly` while there is nothing to save."""
    try:
        yield
    except KeyboardInterrupt as signal:
        name = "SIGTERM" if isinstance(signal, Terminated) else "SIGINT"
        raise StoppedEarly(f"stopped by {name} while preparing to train; run the same command again") from None


# --- Prepare ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _prepared_in_folder(run: TrainRun, resume: bool, watchers: Sequence[Watcher]) -> Iterator[_Setup]:
    """Prepare a run, and keep its folder locked until the block ends.

    An existing folder is locked before anything else. A new folder is created only after all inputs have been checked,
    so that bad input leaves nothing behind.
    """
    output = run.train.output
    with contextlib.ExitStack() as lock:
        is_new = not output.exists()
        if not is_new:
            lock.enter_context(_locked(output, resume))
        setup = _prepare(run, watchers)
        if is_new:
            lock.enter_context(_locked(output, resume))
        processes.barrier("every process has checked its input")
        yield setup


@contextlib.contextmanager
def _locked(output: Path, resume: bool) -> Iterator[None]:
    """Lock the folder of a run in the first process, so that no other run uses it. Create it if it does not exist.

    Raises:
        InputError: another run has locked the folder, or the folder contains a checkpoint and `resume` is false.
    """
    if not processes.is_first():
        yield
        return
    with files.lock(output / ".lock") as acquired:
        if not acquired:
            raise InputError(f"train.output={output}: another run is using this folder; expected an unused folder")
        if not resume and Checkpoints(output / "checkpoints").steps:
            raise InputError(
                f"train.output={output}: already contains a run; pass --resume to continue it, or use another folder"
            )
        yield


def _prepare(run: TrainRun, watchers: Sequence[Watcher]) -> _Setup:
    """Check the inputs, load the data and the model, and build the training step."""
    settings = run.train
    mesh = make_mesh(run.mesh)
    where = f" in {jax.process_count()} processes" if processes.is_distributed() else ""
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    processes.print_once(f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}{where}; mesh: {sizes}")
    check_batch(settings.batch_size, mesh)

    batches = open_batches(run.data, run.clip, run.model, settings.clips_per_step, settings.seed, mesh)
    steps = settings.number_of_steps(len(batches.clips))
    if settings.epochs:
        size = f"{len(batches.clips)} clips, {settings.clips_per_step} per step"
        processes.print_once(f"train.epochs={settings.epochs}: {steps} steps, for {size}")

    first_lora = _read_first_lora(run.lora)
    metadata = {"config": config_dict(run), "data": batches.records.fingerprint}
    metadata["init"] = run.lora.init and files.fingerprint(run.lora.init)
    _check_resumed(run, metadata)
    watchers = [*configured_watchers(run, batches.records, mesh), *watchers]
    model = load_base(run.model, mesh)
    check_widths(batches.records, run.model, model.config)
    _start_adapters(model, first_lora, run, mesh)
    graphdef, lora, frozen = split_lora(model)
    base_size, adapter_size = _count_parameters(frozen), _count_parameters(lora)
    processes.print_once(f"model: {base_size:,} parameters in the base, {adapter_size:,} in the adapters")
    optimizer = make_optimizer(run.optimizer, steps)
    state, state_sharding = init_state(lora, optimizer, mesh, ema=settings.ema_decay is not None)
    step = make_step(
        graphdef, optimizer, run.objective, settings.seed, state_sharding, settings.remat, settings.accumulate,
        settings.ema_decay,
    )  # fmt: skip

    @cache
    def flops_of(shape: tuple[int, ...]) -> int:
        tokens = math.prod(token_grid(shape))
        return training_flops(model.config, run.lora, settings.remat, settings.clips_per_step, tokens).model

    metadata["base"] = _fingerprint(frozen)
    return _Setup(mesh, steps, batches, watchers, graphdef, frozen, state, state_sharding, step, flops_of, metadata)


def _check_resumed(run: TrainRun, metadata: dict[str, Any]) -> None:
    """Compare the run with its newest checkpoint, if there is one, before the base is loaded, which takes minutes."""
    saved = Checkpoints(run.train.output / "checkpoints").newest_metadata()
    if saved is not None:
        check_same_run(saved, metadata, run)


def _read_first_lora(config: configs.LoraConfig) -> Lora | None:
    """Read the LoRA file to start from, if there is one. Raise InputError unless it is as `config` describes it."""
    if config.init is None:
        return None
    lora = read_lora(config.init)
    try:
        check_lora(lora, config)
    except InputError as error:
        raise InputError(f"lora.init={config.init}: {error}") from None
    processes.print_once(f"adapters: {len(lora.adapters)} from {config.init}")
    return lora


def _start_adapters(model: WanTransformer, first_lora: Lora | None, run: TrainRun, mesh: Mesh) -> None:
    """Attach adapters to the model: those of `first_lora`, or new ones."""
    if first_lora is None:
        attach_lora(model, run.lora)
        init_lora(model, run_keys(run.train.seed).adapters, mesh)
        return
    try:
        load_adapters(model, first_lora, mesh)
    except InputError as error:
        raise InputError(f"lora.init={run.lora.init}: {error}") from None


def _count_parameters(state: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


# --- Restore ---------------------------------------------------------------------------------------------------------


def _restore(run: TrainRun, setup: _Setup) -> tuple[int, TrainState]:
    """Return the number of completed steps, and the state after them: from a checkpoint, or the initial state."""
    output = run.train.output

    def make_target(metadata: dict[str, Any]) -> Arrays:
        check_same_run(metadata, setup.metadata, run)
        sharding = flatten(setup.state_sharding)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding[name])
            for name, x in flatten(setup.initial_state).items()
        }

    with Checkpoints(output / "checkpoints", run.train.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(make_target)
    if restored is None and checkpoints.damaged:
        names = ", ".join(path.name for path in checkpoints.damaged)
        raise InputError(
            f"train.output={output}: all checkpoints are damaged ({names}); expected an undamaged one; "
            "to start again from step 0, use another folder or remove this one"
        )
    if restored is None:
        processes.print_once(f"started {output}")
        return 0, setup.initial_state
    state = unflatten(setup.initial_state, restored.arrays)
    processes.print_once(f"resumed {output} after step {restored.step}")
    bad_steps = int(state.bad_steps)
    if restored.step >= setup.steps and bad_steps >= _max_bad_steps(run, setup):
        reason = f"its last steps were skipped (bad steps in a row: {bad_steps})"
        raise NonFiniteLoss(f"train.output={output}: the run is complete, but {reason}")
    return restored.step, state


# --- Loop ------------------------------------------------------------------------------------------------------------


def _compile(setup: _Setup, state: TrainState) -> Step:
    """Compile the training step for every size of clips, so that no step waits for the compiler or fails in it."""
    sizes = list(setup.batches.buckets)
    with jax.set_mesh(setup.mesh):
        compiled = {
            size: _compile_for(setup, state, size, f" ({number} of {len(sizes)})" if len(sizes) > 1 else "")
            for number, size in enumerate(sizes, 1)
        }
    return lambda state, frozen, batch: compiled[batch.latents.shape[1:]](state, frozen, batch)


def _compile_for(setup: _Setup, state: TrainState, latents: tuple[int, ...], count: str) -> Step:
    size, batch = describe_shape(latents), setup.batches.abstract(latents)
    processes.print_once(f"compiling the training step for latents {size}{count} ...")
    start = time.monotonic()
    program: Any = setup.step
    try:
        compiled = program.lower(state, setup.frozen, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CompilerError(f"compiling the training step for latents {size} failed: {reason}") from error
    processes.print_once(f"compiled in {time.monotonic() - start:.1f} s")
    return compiled


def _loop(run: TrainRun, setup: _Setup, state: TrainState, first: int) -> None:
    """Train until the last step, a signal, or too many bad steps in a row; then save a checkpoint."""
    settings, output, done = run.train, run.train.output, first
    signal: str | None = None
    diverged: NonFiniteLoss | None = None
    with (
        interrupts.postponed("saving a checkpoint after this step"),
        Checkpoints(output / "checkpoints", settings.keep_checkpoints, settings.keep_every) as checkpoints,
        _open_reports(run, setup, first) as reports,
    ):

        def report(pass_on: Callable[[], None]) -> None:
            nonlocal diverged
            try:
                pass_on()
            except NonFiniteLoss as error:
                diverged = diverged or error

        def save() -> None:
            checkpoints.save(done, flatten(state), setup.metadata)
            reports.tell(Event("checkpoint", done))
            reports.restart_clock()

        reports.tell(Event("resumed" if first else "started", first))
        reports.look(first, partial(setup.model, state))
        for data_wait, (number, batch, clips) in _timed(setup.batches.iterate(first)):
            with jax.set_mesh(setup.mesh):
                state, values = setup.step(state, setup.frozen, setup.batches.place(batch))
            done, flops = number + 1, setup.flops_of(batch.latents.shape[1:])
            due = done == setup.steps or done % settings.checkpoint_every == 0
            report(partial(reports.add, done, values, clips, flops, data_wait))
            if due or diverged or reports.wants_look(done):
                report(reports.flush)  # reports lag one step, and what follows needs that of this one
            if due or diverged:
                save()
            if not diverged:
                reports.look(done, partial(setup.model, state))
            signal = processes.stop_requested(done)
            if signal and not (due or diverged):
                report(reports.flush)
                save()
            if done == setup.steps or signal or diverged:
                break
        ending = _ending(run, setup, done, signal, diverged)
        reports.tell(Event("stopped" if ending else "finished", done, {"reason": str(ending or "")}))
    processes.barrier("the last checkpoint is complete")
    if ending:
        raise ending


def _ending(
    run: TrainRun, setup: _Setup, done: int, signal: str | None, diverged: NonFiniteLoss | None
) -> Exception | None:
    """Return why the run ended before its last step or diverged; None if it is finished."""
    if diverged:
        return NonFiniteLoss(f"{diverged}; the adapters from before the bad steps are saved in {run.train.output}")
    if done < setup.steps:
        stopped = f"stopped by {signal} after step {done} of {setup.steps}"
        return StoppedEarly(f"{stopped}; to continue, run the same command with --resume")
    return None


def _timed(batches: Iterable[Any]) -> Iterator[tuple[float, Any]]:
    """Yield each item with the seconds that it took to get it."""
    start = time.perf_counter()
    for batch in batches:
        yield time.perf_counter() - start, batch
        start = time.perf_counter()


def _open_reports(run: TrainRun, setup: _Setup, first: int) -> Reports:
    """Write config.yaml, in the first process only, and prepare the reports to the watchers."""
    settings, config = run.train, config_dict(run)
    if processes.is_first():
        configs.dump(config, settings.output / "config.yaml")
    about = About(settings.output, first, setup.steps, settings.clips_per_step, config, setup.mesh)
    speed = Speed(settings.clips_per_step, list(setup.mesh.devices.flat))
    return Reports(
        setup.watchers, about, _max_bad_steps(run, setup), lambda clip: setup.batches.records[clip].video, speed
    )


def _max_bad_steps(run: TrainRun, setup: _Setup) -> int:
    """Return the number of bad steps in a row that ends the run, capped at the number of steps of the run."""
    return min(run.train.max_bad_steps, setup.steps)


def _fingerprint(frozen: Any) -> str:
    """Return the fingerprint of the base weights, which is the same on every mesh."""
    text = json.dumps(fingerprints(flatten(frozen)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
