"""A training run, from a configuration to checkpoints."""

import dataclasses
import hashlib
import json
import math
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from tfm_jax import config as configs
from tfm_jax import hosts
from tfm_jax.checkpoint import Arrays, Checkpoints, fingerprints, flatten, unflatten
from tfm_jax.config import section
from tfm_jax.data.batches import Batch, Batches
from tfm_jax.data.records import Records, open_records
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import attach_lora, init_lora, split_lora
from tfm_jax.sharding import batch_sharding, make_mesh, split
from tfm_jax.train.metrics import Metrics
from tfm_jax.train.optimizer import learning_rate, make_optimizer
from tfm_jax.train.step import init_state, make_step
from tfm_jax.wan import load_base
from tfm_jax.wan.parallel_attention import check_split
from tfm_jax.wan.transformer import WanTransformer, token_grid

MAY_CHANGE = {"train.output", "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every",
              "train.remat", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor", "model.path", "data.path",
              "data.source"}  # fmt: skip
"""Fields in which a resumed run may differ from the run it goes on with: they do not change what is computed."""


@section
class TrainRun:
    """The sections that training reads."""

    model: configs.ModelConfig
    data: configs.DataConfig
    train: configs.TrainConfig
    lora: configs.LoraConfig = dataclasses.field(default_factory=configs.LoraConfig)
    objective: configs.ObjectiveConfig = dataclasses.field(default_factory=configs.ObjectiveConfig)
    optimizer: configs.OptimizerConfig = dataclasses.field(default_factory=configs.OptimizerConfig)
    mesh: configs.MeshConfig = dataclasses.field(default_factory=configs.MeshConfig)


def train(run: TrainRun, resume: bool = False) -> None:
    """Train a LoRA and leave config.yaml, metrics.jsonl and checkpoints/ in `run.train.output`.

    With `resume`, go on from the newest checkpoint there, exactly as if the run had not been interrupted. Several
    processes (`tfm_jax.hosts`) all call this with the same arguments and see the same files.

    Raises:
        InputError: what the configuration names is missing, does not fit together, or would be overwritten.
        NonFiniteLoss: training diverged.
    """
    settings = run.train
    mesh = make_mesh(run.mesh)
    if hosts.several():
        hosts.say(f"{jax.process_count()} processes, {mesh.size} devices")
    check_batch(settings.batch_size, mesh)
    _check_output(run, resume)
    records = open_records(run.data.path)
    check_split(run.model.heads, math.prod(token_grid(records[0].latents.shape)), mesh)
    batches = Batches(records, settings.batch_size, settings.seed, _rows(settings.batch_size, mesh))
    model = load_base(run.model, mesh)
    _check_records(records, model, run)
    attach_lora(model, run.lora)
    init_lora(model, jax.random.key(settings.seed), mesh)

    graph, lora, frozen = split_lora(model)
    optimizer = make_optimizer(run.optimizer)
    state, placement = init_state(lora, optimizer, mesh)
    del model, lora  # the state has copies
    step_fn = make_step(graph, optimizer, run.objective, settings.seed, placement, settings.remat)
    base = _digest(frozen)
    schedule = learning_rate(run.optimizer)
    hosts.meet("every process has checked its input")
    settings.output.mkdir(parents=True, exist_ok=True)

    facts = {"config": configs.plain(run), "base": base, "data": records.fingerprint}
    first = 0
    if resume:
        with Checkpoints(settings.output / "checkpoints", settings.keep_checkpoints) as checkpoints:
            restored = checkpoints.restore(partial(_wanted, run, facts, _abstract(state, placement)))
        if restored is None:
            raise InputError(f"train.output={settings.output}: no checkpoint to resume from; remove it and start anew")
        first = restored.step
        if first >= settings.steps:
            raise InputError(
                f"train.steps={settings.steps}: the run in {settings.output} has {first} already; nothing to do"
            )
        state = unflatten(state, restored.arrays)
        hosts.say(f"resumed {settings.output} after step {first}")

    done, stop = first, False
    with Checkpoints(settings.output / "checkpoints", settings.keep_checkpoints) as checkpoints, jax.set_mesh(mesh):
        if hosts.is_first():
            configs.dump(run, settings.output / "config.yaml")
        log = settings.output / "metrics.jsonl" if hosts.is_first() else None
        with Metrics(log, first, settings.steps, settings.batch_size, settings.log_every) as metrics:
            for number, batch, clips in batches.iterate(first):
                if number >= settings.steps:
                    break
                rate = float(np.asarray(schedule(number)))
                state, report = step_fn(state, frozen, _place(batch, batches, mesh))
                done = number + 1
                metrics.add(done, {**report, "learning_rate": rate}, clips)
                stop = hosts.stop_requested(done)
                if done % settings.checkpoint_every == 0 or done == settings.steps or stop:
                    metrics.flush()  # a diverged state is never saved
                    checkpoints.save(done, flatten(state), facts)
                if stop:
                    break
    if stop and done < settings.steps:
        hosts.say(f"stopped by SIGTERM after step {done}; the same command with --resume goes on")


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raise InputError unless every part of the mesh that shares the batch gets the same number of clips."""
    parts = split("batch", mesh)
    if batch_size % parts:
        above = -(-batch_size // parts) * parts
        raise InputError(
            f"train.batch_size={batch_size}: expected a multiple of mesh.data={mesh.shape['data']} x mesh.fsdp="
            f"{mesh.shape['fsdp']}; use {above}, or split less by data and fsdp and more by sequence or tensor"
        )


def _check_output(run: TrainRun, resume: bool) -> None:
    output = run.train.output
    if output.exists() and not output.is_dir():
        raise InputError(f"train.output={output}: a file; expected a directory")
    if not resume and output.exists() and any((output / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise InputError(f"train.output={output}: has a run already; add --resume to go on with it, or name another")
    if resume and not (output / "checkpoints").is_dir():
        raise InputError(f"train.output={output}: no checkpoints to resume from; start without --resume")


def _check_records(records: Records, model: WanTransformer, run: TrainRun) -> None:
    record = records[0]
    channels, text_dim = record.latents.shape[-1], record.text.shape[-1]
    if (channels, text_dim) != (model.config.channels, model.config.text_dim):
        raise InputError(
            f"{run.data.path}: prepared with {channels} channels and text width {text_dim}; the transformer of "
            f"{run.model.path} takes {model.config.channels} and {model.config.text_dim}; prepare the data with it"
        )


def _wanted(run: TrainRun, facts: dict[str, Any], abstract: Arrays, saved: dict[str, Any]) -> Arrays:
    """The arrays to restore from a checkpoint, after a check that `saved`, its metadata, is of the same run."""
    output = run.train.output
    before, now = _leaves(saved["config"]), _leaves(facts["config"])
    for name in sorted(before.keys() | now.keys()):
        if name not in MAY_CHANGE and before.get(name) != now.get(name):
            raise InputError(f"{name}={now.get(name)}: the run in {output} was started with {before.get(name)}")
    if saved["data"] != facts["data"]:
        raise InputError(f"data.path={run.data.path}: not the clips that the run in {output} was started with")
    if saved["base"] != facts["base"]:
        raise InputError(f"model.path={run.model.path}: not the base weights that the run in {output} was started with")
    return abstract


def _leaves(sections: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{field}": value for name, part in sections.items() for field, value in part.items()}


def _abstract(state: Any, placement: Any) -> dict[str, jax.ShapeDtypeStruct]:
    where = flatten(placement)
    return {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[n]) for n, x in flatten(state).items()}


def _digest(frozen: Any) -> str:
    """A name for the base weights, the same on every mesh."""
    marks = fingerprints(flatten(frozen))
    return hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()[:16]


def _rows(batch_size: int, mesh: Mesh) -> list[int]:
    """The rows of a batch that the devices of this process hold."""
    parts: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(batch_size))})


def _place(batch: Batch, batches: Batches, mesh: Mesh) -> Batch:
    """The batch on the devices of all processes, from the rows of this one."""

    def place(values: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = range(*index[0].indices(batches.batch_size))
            start = batches.rows.index(wanted.start)
            return values[(slice(start, start + len(wanted)), *index[1:])]

        shape = (batches.batch_size, *values.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh), part)

    return Batch(*(place(np.asarray(values)) for values in batch))
