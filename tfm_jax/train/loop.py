"""A training run, from a configuration to checkpoints: prepare, restore, train."""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from tfm_jax import config as configs
from tfm_jax import files, hosts, interrupts
from tfm_jax.checkpoint import Arrays, Checkpoints, fingerprints, flatten, unflatten
from tfm_jax.config import section
from tfm_jax.data.batches import Batches
from tfm_jax.data.records import Records, open_records
from tfm_jax.errors import CompilerError, InputError, NonFiniteLoss, StoppedEarly, Terminated
from tfm_jax.lora.adapters import attach_lora, init_lora, split_lora
from tfm_jax.sharding import check_batch, check_split, make_mesh
from tfm_jax.train.metrics import Metrics
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.train.step import Step, TrainState, init_state, make_step, run_keys
from tfm_jax.wan import load_base
from tfm_jax.wan.transformer import WanTransformer, token_grid

MAY_CHANGE = {"train.output", "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every",
              "train.max_bad_steps", "train.remat", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor",
              "model.path", "data.path"}  # fmt: skip
"""Fields in which a resumed run may differ from the run that it continues: they do not change what is computed."""


@section
class TrainRun:
    """The sections that training reads."""

    model: configs.ModelConfig
    clip: configs.ClipConfig
    data: configs.DataConfig
    train: configs.TrainConfig
    lora: configs.LoraConfig = dataclasses.field(default_factory=configs.LoraConfig)
    objective: configs.ObjectiveConfig = dataclasses.field(default_factory=configs.ObjectiveConfig)
    optimizer: configs.OptimizerConfig = dataclasses.field(default_factory=configs.OptimizerConfig)
    mesh: configs.MeshConfig = dataclasses.field(default_factory=configs.MeshConfig)


class _Setup(NamedTuple):
    """What a run works with."""

    mesh: Mesh
    batches: Batches
    frozen: nnx.State
    state: TrainState
    """Before the first step."""
    placement: TrainState
    step: Step
    metadata: dict[str, Any]
    """Saved with every checkpoint: configuration, base weights and data, by which a run is recognised."""


def train(run: TrainRun, resume: bool = False) -> None:
    """Train a LoRA and leave config.yaml, metrics.jsonl and checkpoints/ in `run.train.output`.

    With `resume`, continue from the newest checkpoint there, exactly as if the run had not been interrupted; start if
    there is none. Several processes (`tfm_jax.hosts`) all call this with the same arguments and see the same files.

    Raises:
        InputError: what the configuration names is missing, does not fit together or would be overwritten, or another
            run is using the folder.
        NonFiniteLoss: training diverged.
        CompilerError: the training step could not be compiled.
        StoppedEarly: Ctrl-C or SIGTERM stopped the run before its last step.
    """
    output, steps = run.train.output, run.train.steps
    files.check_output_directory("train.output", output)
    hosts.print_once(f"training a LoRA in {output}: {steps} steps, batches of {run.train.batch_size}")
    with contextlib.ExitStack() as held:
        with _nothing_to_keep():
            # A new folder is made only after everything that can be wrong with the input has been checked.
            is_new = not output.exists()
            if not is_new:
                held.enter_context(_alone(output, resume))
            setup = _prepare(run)
            if is_new:
                held.enter_context(_alone(output, resume))
            hosts.barrier("every process has checked its input")
            first, state = _restore(run, setup)
            if first >= steps:
                hosts.print_once(f"{output} is complete: it has {first} steps, and train.steps={steps}")
                return
            step = _compile(setup, state, first)
        _train(run, setup._replace(step=step), state, first)


# --- Prepare ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _nothing_to_keep() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM before the first step into `StoppedEarly`."""
    try:
        yield
    except KeyboardInterrupt as signal:
        name = "SIGTERM" if isinstance(signal, Terminated) else "SIGINT"
        raise StoppedEarly(f"stopped by {name} before the first step; the same command starts again") from None


@contextlib.contextmanager
def _alone(output: Path, resume: bool) -> Iterator[None]:
    """Hold the folder of a run, made if it does not exist, as its only run.

    Raises:
        InputError: another run holds it, or it has a checkpoint and `resume` was not asked for.
    """
    if not hosts.is_first():
        yield
        return
    with files.lock(output / ".lock") as free:
        if not free:
            raise InputError(f"train.output={output}: another run is using this folder; expected a folder of its own")
        if not resume and Checkpoints(output / "checkpoints").steps:
            raise InputError(
                f"train.output={output}: already contains a run; pass --resume to continue it, or name another folder"
            )
        yield


def _prepare(run: TrainRun) -> _Setup:
    settings = run.train
    mesh = make_mesh(run.mesh)
    processes = f" in {jax.process_count()} processes" if hosts.is_distributed() else ""
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    hosts.print_once(f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}{processes}; mesh: {sizes}")
    check_batch(settings.batch_size, mesh)

    records = open_records(run.data.path)
    _check_clip(records, run)
    shape = records[0].latents.shape
    hosts.print_once(f"data: {len(records)} clips in {run.data.path}, latents {' x '.join(map(str, shape))}")
    check_split(run.model.heads, math.prod(token_grid(shape)), mesh)
    batches = Batches(records, settings.batch_size, settings.seed, mesh)

    model = load_base(run.model, mesh)
    _check_records(records, model, run)
    attach_lora(model, run.lora)
    init_lora(model, run_keys(settings.seed).adapters, mesh)
    graph, lora, frozen = split_lora(model)
    hosts.print_once(f"model: {_parameters(frozen):,} parameters in the base, {_parameters(lora):,} in the adapters")
    optimizer = make_optimizer(run.optimizer)
    state, placement = init_state(lora, optimizer, mesh)
    step = make_step(graph, optimizer, run.objective, settings.seed, placement, settings.remat)
    metadata = {"config": _plain(run), "base": _digest(frozen), "data": records.fingerprint}
    return _Setup(mesh, batches, frozen, state, placement, step, metadata)


def _check_clip(records: Records, run: TrainRun) -> None:
    """Raise InputError unless the clips were prepared as the configuration says."""
    for name, value in _plain(run)["clip"].items():
        prepared = records.metadata.get(name)
        if prepared is None:
            raise InputError(f"{run.data.path}: does not say with which clip.{name} it was prepared; prepare it again")
        if prepared != value:
            raise InputError(
                f"clip.{name}={value}: data.path={run.data.path} was prepared with {prepared}; expected the same"
            )


def _check_records(records: Records, model: WanTransformer, run: TrainRun) -> None:
    record = records[0]
    channels, text_dim = record.latents.shape[-1], record.text.shape[-1]
    if (channels, text_dim) != (model.config.channels, model.config.text_dim):
        raise InputError(
            f"{run.data.path}: prepared with {channels} channels and text width {text_dim}; the transformer of "
            f"{run.model.path} takes {model.config.channels} and {model.config.text_dim}; prepare the data with it"
        )


def _plain(run: TrainRun) -> dict[str, dict[str, Any]]:
    """The configuration as it is kept: without the folder of clips, which preparing reads, not training."""
    values = configs.plain(run)
    del values["data"]["source"]
    return values


def _parameters(state: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


# --- Restore ---------------------------------------------------------------------------------------------------------


def _restore(run: TrainRun, setup: _Setup) -> tuple[int, TrainState]:
    """How many steps are done, and the state after them."""
    output = run.train.output

    def wanted(metadata: dict[str, Any]) -> Arrays:
        _check_same_run(metadata, setup.metadata, run)
        where = flatten(setup.placement)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name])
            for name, x in flatten(setup.state).items()
        }

    with Checkpoints(output / "checkpoints", run.train.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(wanted)
    if restored is None and checkpoints.set_aside:
        names = ", ".join(path.name for path in checkpoints.set_aside)
        raise InputError(
            f"train.output={output}: all checkpoints are damaged ({names}); expected a good one to resume from; "
            "to start at step 0, name another folder or remove this one"
        )
    if restored is None:
        hosts.print_once(f"started {output}")
        return 0, setup.state
    state = unflatten(setup.state, restored.arrays)
    hosts.print_once(f"resumed {output} after step {restored.step}")
    bad_steps = int(state.bad_steps)
    if restored.step >= run.train.steps and bad_steps >= _most_bad_steps(run):
        raise NonFiniteLoss(f"train.output={output}: the run is complete, but its last {bad_steps} steps were skipped")
    return restored.step, state


def _check_same_run(saved: dict[str, Any], now: dict[str, Any], run: TrainRun) -> None:
    """Raise InputError if a checkpoint with the metadata `saved` is not of the run with the metadata `now`."""
    output = run.train.output
    config = configs.from_plain(TrainRun, saved["config"], str(output / "checkpoints"))
    before, after = _leaves(_plain(config)), _leaves(now["config"])
    for name, value in after.items():
        if name not in MAY_CHANGE and before[name] != value:
            raise InputError(f"{name}={value}: the run in {output} was started with {before[name]}")
    if saved["data"] != now["data"]:
        raise InputError(f"data.path={run.data.path}: not the clips that the run in {output} was started with")
    if saved["base"] != now["base"]:
        raise InputError(f"model.path={run.model.path}: not the base weights that the run in {output} was started with")


def _leaves(sections: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{field}": value for name, part in sections.items() for field, value in part.items()}


# --- Train -----------------------------------------------------------------------------------------------------------


def _compile(setup: _Setup, state: TrainState, first: int) -> Step:
    """The training step as a compiled program, so that the clock of the run starts without the compiler."""
    hosts.print_once("compiling the training step ...")
    start = time.monotonic()
    batch, _ = setup.batches.read(first)
    program: Any = setup.step
    try:
        with jax.set_mesh(setup.mesh):
            compiled = program.lower(state, setup.frozen, setup.batches.place(batch)).compile()
    except jax.errors.JaxRuntimeError as error:
        raise CompilerError(f"the training step: {' '.join(str(error).split())[:300]}") from error
    hosts.print_once(f"compiled in {time.monotonic() - start:.1f} s")
    return compiled


def _train(run: TrainRun, setup: _Setup, state: TrainState, first: int) -> None:
    """The steps after `first`, until the last one, a signal or too many bad steps; then a checkpoint is saved."""
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
            signal = hosts.stop_requested(done)
            last = done == settings.steps or signal is not None
            save = last or done % settings.checkpoint_every == 0
            try:
                metrics.add(done, report, clips)
                if save:
                    metrics.flush()
            except NonFiniteLoss as error:
                diverged = error
                with contextlib.suppress(NonFiniteLoss):
                    metrics.flush()  # the step that was computed meanwhile
            if save or diverged:
                checkpoints.save(done, flatten(state), setup.metadata)
            if last or diverged:
                break
    hosts.barrier("the last checkpoint is complete")
    if diverged:
        raise NonFiniteLoss(f"{diverged}; the adapters before the bad steps are saved in {output}")
    if done < settings.steps:
        raise StoppedEarly(
            f"stopped by {signal} after step {done} of {settings.steps}; the same command with --resume continues"
        )


def _open_metrics(run: TrainRun, setup: _Setup, first: int) -> Metrics:
    """metrics.jsonl of the run, and config.yaml beside it; both are written by the first process."""
    settings, output = run.train, run.train.output
    file = None
    if hosts.is_first():
        file = output / "metrics.jsonl"
        configs.dump(_plain(run), output / "config.yaml")
    return Metrics(
        file, first, settings.steps, settings.batch_size, settings.log_every, _most_bad_steps(run),
        lambda clip: setup.batches.records[clip].video,
    )  # fmt: skip


def _most_bad_steps(run: TrainRun) -> int:
    """The number of bad steps in a row that ends the run. A short run in which all are bad has not trained anything."""
    return min(run.train.max_bad_steps, run.train.steps)


def _digest(frozen: Any) -> str:
    """A name for the base weights, the same on every mesh."""
    marks = fingerprints(flatten(frozen))
    return hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()[:16]
