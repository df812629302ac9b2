"""Validation: the loss on held-out clips, at fixed noise and fixed noise levels."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from tfm_jax import config as configs
from tfm_jax import interrupts, processes
from tfm_jax.arrays import PerVideo
from tfm_jax.data.batches import Batch, read_clips
from tfm_jax.data.order import is_held_out
from tfm_jax.data.records import Records
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import without_lora
from tfm_jax.objective import Draws, objective_loss
from tfm_jax.sharding import num_shards, replicated
from tfm_jax.train.metrics import JsonLines, lines_up_to
from tfm_jax.train.run import TrainRun
from tfm_jax.train.step import LEVEL_BINS
from tfm_jax.train.watching import About, Event, Watcher
from tfm_jax.wan.transformer import WanTransformer

LEVELS = (np.arange(LEVEL_BINS) + 0.5) / LEVEL_BINS
"""The noise levels of an evaluation: the middle of each bin over which metrics.jsonl reports the training loss."""

LOSSES = ("fm", "tfm")
"""The objectives whose losses are evaluated, whichever of them is trained."""

FILE = "validation.jsonl"


class Validation(Watcher):
    """Evaluates the LoRA every `train.eval_every` steps and after the last step, and the base once.

    Each of up to `train.eval_clips` held-out clips is evaluated at each of the `LEVELS`, for each of the `LOSSES`,
    without weights. The noise depends only on the number of the clip and the level, so that evaluations of different
    steps, runs and machines can be compared. At step 0, the LoRA is only evaluated if it starts from `lora.init`;
    otherwise it equals the base.

    Raises:
        InputError: no clip is held out.
    """

    def __init__(self, run: TrainRun, records: Records, mesh: Mesh):
        self._every = run.train.eval_every or 0
        self._from_start = run.lora.init is not None
        self._records = records
        self._mesh = mesh
        held_out = [n for n, entry in enumerate(records.index) if is_held_out(entry.video, run.data.held_out)]
        if not held_out:
            found = f"data.held_out={run.data.held_out} holds out no clip of {records.folder}"
            raise InputError(f"train.eval_every={self._every}: {found}; expected at least one, such as with 0.05")
        self._clips = _spread(held_out, run.train.eval_clips)
        shapes = {clip: records.index[clip].latents for clip in self._clips}
        self._batches = _batches(shapes, run.train.batch_size, num_shards("batch", mesh))
        processes.print_once(f"validation: {len(self._clips)} of {len(held_out)} held-out clips")
        self._losses: Any = jax.jit(_losses(run.objective), out_shardings=replicated(mesh))
        self._lines: Any = None

    def open(self, about: About) -> None:
        self._last = about.last
        self._done = _read_done(about)
        if processes.is_first():
            self._lines = JsonLines(about.output / FILE, about.first)

    def wants(self, step: int) -> bool:
        return bool(self._models_due(step))

    def _models_due(self, step: int) -> list[str]:
        """Return which of the models, base and lora, are still to be evaluated at this step."""
        due = [] if ("base", 0) in self._done else ["base"]
        regular = step % self._every == 0 or step == self._last
        if regular and (step > 0 or self._from_start) and ("lora", step) not in self._done:
            due.append("lora")
        return due

    def look(self, step: int, model: WanTransformer) -> Iterator[Event]:
        for name in self._models_due(step):
            by_level = self._evaluate(model if name == "lora" else without_lora(model))
            if by_level is None:  # a signal arrived
                return
            at = step if name == "lora" else 0
            self._done.add((name, at))
            loss = {kind: float(np.mean(levels)) for kind, levels in by_level.items()}
            values = {"model": name, "loss": loss, "by_level": by_level, "clips": len(self._clips)}
            yield Event("validation", at, values)

    def _evaluate(self, model: WanTransformer) -> dict[str, list[float]] | None:
        """Return the mean loss at each level. A single process stops at a signal, and returns None."""
        sums = {kind: np.zeros(len(LEVELS)) for kind in LOSSES}
        text_len = model.config.text_len
        for clips, count in self._batches:
            batch, numbers = read_clips(self._records, clips, self._mesh, text_len), jnp.asarray(clips, jnp.int32)
            for level in range(len(LEVELS)):
                if interrupts.requested() and not processes.is_distributed():
                    return None
                with jax.set_mesh(self._mesh):
                    losses = self._losses(model, batch, numbers, jnp.int32(level))
                for kind, values in losses.items():
                    sums[kind][level] += np.asarray(values, np.float64)[:count].sum()
        return {kind: (values / len(self._clips)).tolist() for kind, values in sums.items()}

    def on_event(self, event: Event) -> None:
        if event.kind == "validation":
            self._lines.append({"step": event.step, **event.values})

    def close(self) -> None:
        if self._lines:
            self._lines.close()


def _losses(objective: configs.ObjectiveConfig) -> Any:
    """Return a function (model, batch, numbers of its clips, level) -> the losses of each video, by name."""

    def losses(
        model: WanTransformer, batch: Batch, clips: Int[Array, "b"], level: Int[Array, ""]
    ) -> dict[str, PerVideo]:
        def noise(clip: Int[Array, ""]) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), clip), level)
            return jax.random.normal(key, batch.latents.shape[1:], jnp.float32)

        sigma = jnp.full(len(clips), jnp.asarray(LEVELS, jnp.float32)[level])
        draws = Draws(jax.vmap(noise)(clips), sigma, jnp.ones_like(sigma))
        clean, text = jnp.asarray(batch.latents, jnp.float32), jnp.asarray(batch.text, jnp.float32)
        results = {}
        for kind in LOSSES:
            config = dataclasses.replace(objective, kind=kind, weight="none")
            results[kind] = objective_loss(model, clean, text, draws, config)[2]
        return results

    return losses


def _spread(clips: list[int], count: int) -> list[int]:
    """Choose up to `count` of the clips, evenly spaced."""
    count = min(count, len(clips))
    return [clips[n * len(clips) // count] for n in range(count)]


def _batches(shapes: Mapping[int, tuple[int, ...]], batch_size: int, shards: int) -> list[tuple[list[int], int]]:
    """Divide the clips into batches of one shape of latents, each filled up with copies of its last clip.

    Args:
        shapes: clip -> shape of its latents.
        batch_size: largest number of rows.
        shards: number of parts into which the mesh splits a batch; it divides `batch_size`.

    Returns:
        For each batch, its clips and the number of them that are no copies.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for clip, shape in shapes.items():
        by_shape.setdefault(shape, []).append(clip)
    batches = []
    for group in by_shape.values():
        size = min(batch_size, -(-len(group) // shards) * shards)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            batches.append((part + part[-1:] * (size - len(part)), len(part)))
    return batches


def _read_done(about: About) -> set[tuple[str, int]]:
    """Return the model and the step of the evaluations that an interrupted run made up to its last checkpoint."""
    lines = [json.loads(line) for line in lines_up_to(about.output / FILE, about.first)]
    return {(line["model"], line["step"]) for line in lines}
