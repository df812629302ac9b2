"""A training run: prepare it from a configuration, restore the newest checkpoint, and train."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from tfm_jax import config as configs
from tfm_jax import files, interrupts, processes
from tfm_jax.checkpoint import Arrays, Checkpoints, fingerprints, flatten, unflatten
from tfm_jax.config import section
from tfm_jax.data.batches import Batch, Batches
from tfm_jax.errors import CompilerError, InputError, NonFiniteLoss, StoppedEarly, Terminated
from tfm_jax.lora.adapters import attach_lora, init_lora, split_lora
from tfm_jax.sharding import check_batch, make_mesh
from tfm_jax.train.data import check_widths, describe_shape, open_batches
from tfm_jax.train.metrics import Metrics
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.train.step import Step, TrainState, init_state, make_step, run_keys
from tfm_jax.wan import load_base

MAY_CHANGE = {"train.output", "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every",
              "train.max_bad_steps", "train.remat", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor",
              "model.path", "data.path"}  # fmt: skip
"""Fields that may differ when a run is resumed, because they do not change what a step computes, beyond rounding.
Base weights and data may move, but their fingerprints must stay the same."""


@section
class TrainRun(configs.TrainingSections):
    """The sections of the configuration that training reads."""

    data: configs.DataConfig
    mesh: configs.MeshConfig = dataclasses.field(default_factory=configs.MeshConfig)


class _Setup(NamedTuple):
    """Everything that a run needs, built by `_prepare`."""

    mesh: Mesh
    batches: Batches
    frozen: nnx.State
    initial_state: TrainState
    state_sharding: TrainState
    step: Step
    metadata: dict[str, Any]
    """The configuration, and the fingerprints of the base weights and the data. It is saved with every checkpoint and
    compared when a run is resumed."""


def train(run: TrainRun, resume: bool = False) -> None:
    """Train a LoRA, and write config.yaml, metrics.jsonl and checkpoints/ to `run.train.output`.

    With `resume`, training continues from the newest undamaged checkpoint, exactly as if it had not been interrupted,
    or starts from step 0 if there is no checkpoint. In a run of several processes (`tfm_jax.processes`), every process
    calls this with the same arguments, on a shared filesystem.

    Raises:
        InputError: an input is missing or damaged, inputs do not fit together, results would be overwritten, or
            another run is using the folder.
        NonFiniteLoss: training diverged.
        CompilerError: the training step could not be compiled.
        StoppedEarly: Ctrl-C or SIGTERM stopped the run before its last step.
    """
    output, steps = run.train.output, run.train.steps
    files.check_output_directory("train.output", output)
    processes.print_once(f"training a LoRA in {output}: {steps} steps, batches of {run.train.batch_size}")
    with contextlib.ExitStack() as stack:
        with _stop_on_signal():
            setup = stack.enter_context(_prepared_in_folder(run, resume))
            first, state = _restore(run, setup)
            if first >= steps:
                processes.print_once(f"{output} is complete: it has {first} steps, and train.steps={steps}")
                return
            step = _compile(setup, state, first)
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
def _prepared_in_folder(run: TrainRun, resume: bool) -> Iterator[_Setup]:
    """Prepare a run, and keep its folder locked until the block ends.

    An existing folder is locked before anything else. A new folder is created only after all inputs have been checked,
    so that bad input leaves nothing behind.
    """
    output = run.train.output
    with contextlib.ExitStack() as lock:
        is_new = not output.exists()
        if not is_new:
            lock.enter_context(_locked(output, resume))
        setup = _prepare(run)
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


def _prepare(run: TrainRun) -> _Setup:
    """Check the inputs, load the data and the model, and build the training step."""
    settings = run.train
    mesh = make_mesh(run.mesh)
    where = f" in {jax.process_count()} processes" if processes.is_distributed() else ""
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    processes.print_once(f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}{where}; mesh: {sizes}")
    check_batch(settings.batch_size, mesh)

    batches = open_batches(run.data, run.clip, run.model, settings.batch_size, settings.seed, mesh)

    model = load_base(run.model, mesh)
    check_widths(batches.records, run.model, model.config)
    attach_lora(model, run.lora)
    init_lora(model, run_keys(settings.seed).adapters, mesh)
    graphdef, lora, frozen = split_lora(model)
    base_size, adapter_size = _count_parameters(frozen), _count_parameters(lora)
    processes.print_once(f"model: {base_size:,} parameters in the base, {adapter_size:,} in the adapters")
    optimizer = make_optimizer(run.optimizer)
    state, state_sharding = init_state(lora, optimizer, mesh)
    step = make_step(graphdef, optimizer, run.objective, settings.seed, state_sharding, settings.remat)
    metadata = {"config": _config_dict(run), "base": _fingerprint(frozen), "data": batches.records.fingerprint}
    return _Setup(mesh, batches, frozen, state, state_sharding, step, metadata)


def _config_dict(run: TrainRun) -> dict[str, dict[str, Any]]:
    """Return the configuration that is saved: nested dictionaries, without the fields that only tfm-prepare uses."""
    values = configs.plain(run)
    values["data"] = {name: values["data"][name] for name in ("path", "held_out", "caption_dropout")}
    return values


def _count_parameters(state: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


# --- Restore ---------------------------------------------------------------------------------------------------------


def _restore(run: TrainRun, setup: _Setup) -> tuple[int, TrainState]:
    """Return the number of completed steps, and the state after them: from a checkpoint, or the initial state."""
    output = run.train.output

    def make_target(metadata: dict[str, Any]) -> Arrays:
        _check_same_run(metadata, setup.metadata, run)
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
    if restored.step >= run.train.steps and bad_steps >= _max_bad_steps(run):
        reason = f"its last steps were skipped (bad steps in a row: {bad_steps})"
        raise NonFiniteLoss(f"train.output={output}: the run is complete, but {reason}")
    return restored.step, state


def _check_same_run(saved: dict[str, Any], now: dict[str, Any], run: TrainRun) -> None:
    """Raise InputError unless a checkpoint with metadata `saved` belongs to the run with metadata `now`."""
    output = run.train.output
    started = f"the run in {output} was started with"
    config = configs.from_plain(TrainRun, saved["config"], str(output / "checkpoints"))
    before, after = _fields(_config_dict(config)), _fields(now["config"])
    for name, value in after.items():
        if name not in MAY_CHANGE and before[name] != value:
            raise InputError(f"{name}={value}: {started} {before[name]}; expected the same value")
    if saved["data"] != now["data"]:
        raise InputError(f"data.path={run.data.path}: these are not the clips that {started}")
    if saved["base"] != now["base"]:
        raise InputError(f"model.path={run.model.path}: these are not the base weights that {started}")


def _fields(sections: dict[str, Any]) -> dict[str, Any]:
    """Map the full name of every field, such as `lora.rank`, to its value."""
    return {f"{name}.{field}": value for name, part in sections.items() for field, value in part.items()}


# --- Loop ------------------------------------------------------------------------------------------------------------


def _compile(setup: _Setup, state: TrainState, first: int) -> Step:
    """Compile the training step for the batch of step `first`, so that the measured speed does not include compilation.

    The result compiles the step for every other size of clips when the size first occurs.
    """
    compiled: dict[tuple[int, ...], Step] = {}

    def compiled_for(state: TrainState, batch: Batch) -> Step:
        shape = batch.latents.shape
        if shape not in compiled:
            compiled[shape] = _compile_for(setup, state, batch)
        return compiled[shape]

    batch, _ = setup.batches.read(first)
    with jax.set_mesh(setup.mesh):
        compiled_for(state, setup.batches.place(batch))
    return lambda state, frozen, batch: compiled_for(state, batch)(state, frozen, batch)


def _compile_for(setup: _Setup, state: TrainState, batch: Batch) -> Step:
    size = describe_shape(batch.latents.shape[1:])
    processes.print_once(f"compiling the training step for latents {size} ...")
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
        Checkpoints(output / "checkpoints", settings.keep_checkpoints) as checkpoints,
        jax.set_mesh(setup.mesh),
        _open_metrics(run, setup, first) as metrics,
    ):
        for number, batch, clips in setup.batches.iterate(first):
            state, report = setup.step(state, setup.frozen, setup.batches.place(batch))
            done = number + 1
            signal = processes.stop_requested(done)
            stop = done == settings.steps or signal is not None
            save = stop or done % settings.checkpoint_every == 0
            try:
                metrics.add(done, report, clips)
                if save:
                    metrics.flush()
            except NonFiniteLoss as error:
                diverged = error
                # Metrics lag one step, so write those of the step that has already been computed.
                with contextlib.suppress(NonFiniteLoss):
                    metrics.flush()
            if save or diverged:
                checkpoints.save(done, flatten(state), setup.metadata)
            if stop or diverged:
                break
    processes.barrier("the last checkpoint is complete")
    if diverged:
        raise NonFiniteLoss(f"{diverged}; the adapters from before the bad steps are saved in {output}")
    if done < settings.steps:
        raise StoppedEarly(
            f"stopped by {signal} after step {done} of {settings.steps}; "
            "to continue, run the same command with --resume"
        )


def _open_metrics(run: TrainRun, setup: _Setup, first: int) -> Metrics:
    """Open metrics.jsonl and write config.yaml, both in the first process only."""
    settings, output = run.train, run.train.output
    file = None
    if processes.is_first():
        file = output / "metrics.jsonl"
        configs.dump(_config_dict(run), output / "config.yaml")
    return Metrics(
        file, first, settings.steps, settings.batch_size, settings.log_every, _max_bad_steps(run),
        lambda clip: setup.batches.records[clip].video,
    )  # fmt: skip


def _max_bad_steps(run: TrainRun) -> int:
    """Return the number of bad steps in a row that ends the run, capped at the number of steps of the run."""
    return min(run.train.max_bad_steps, run.train.steps)


def _fingerprint(frozen: Any) -> str:
    """Return the fingerprint of the base weights, which is the same on every mesh."""
    text = json.dumps(fingerprints(flatten(frozen)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
