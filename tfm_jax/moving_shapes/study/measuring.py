"""Samples and measures the model of a run: metrics of its samples, and its sensitivity to the order of frames."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tfm_jax import video
from tfm_jax.data.batches import Batches
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.files import read_lora
from tfm_jax.moving_shapes.evaluation.folders import measure_folder
from tfm_jax.moving_shapes.evaluation.set_metrics import Row, compare
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.clips import World
from tfm_jax.moving_shapes.study.plan import Study
from tfm_jax.moving_shapes.study.results import Record
from tfm_jax.moving_shapes.study.sensitivity import measure_sensitivity
from tfm_jax.numbers import finite_or_none
from tfm_jax.prompts import read_prompts
from tfm_jax.sampling.pipeline import SampleRun, sample
from tfm_jax.sharding import one_device_mesh
from tfm_jax.wan import load_base, load_vae


def measure_autoencoder(study: Study, law: str, world: World) -> Record:
    """Measure held-out clips that passed through the autoencoder, the best that a model can reach.

    Return these metrics with those of the reference and the floor, and the prompts.
    """
    vae = load_vae(study.run.model.path)
    folder = study.output / law / "autoencoder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, record in enumerate(world.numbers):
        pixels = vae.decode(jnp.asarray(world.held_out[record].latents, jnp.float32)[None])
        video.write_clip(folder / f"{number:03d}.mp4", video.to_uint8(np.asarray(pixels)[0]), study.run.clip.rate)
    rows, compared = _compare(study, folder, world)
    columns = {side: column(rows, side) for side in ("generated", "reference", "floor")}
    return {"compared": compared, "prompts": read_prompts(world.prompts), **columns}


def measure_samples(study: Study, world: World, lora: Path | None, seed: int, folder: Path) -> dict[str, float | None]:
    """Sample every prompt into `folder`, with the base model if `lora` is None, and return the metrics."""
    sampling = dataclasses.replace(study.run.sampling, prompts=world.prompts, output=folder, lora=lora, seed=seed)
    sample(SampleRun(model=study.run.model, clip=study.run.clip, sampling=sampling))
    rows, _ = _compare(study, folder, world)
    return column(rows, "generated")


def measure_order(study: Study, world: World, lora: Path | None) -> dict[str, list[float]]:
    """Measure the sensitivity to the order of frames, on the same clips, permutations and noise for all runs."""
    transformer = load_base(study.run.model)
    if lora:
        load_adapters(transformer, read_lora(lora))
    count = min(protocol.SENSITIVITY_CLIPS, len(world.held_out))
    batch, _ = Batches(world.held_out, count, 0, one_device_mesh(), transformer.config.text_len).read(0)
    latents, text = (np.asarray(values, np.float32) for values in batch)
    return measure_sensitivity(transformer, latents, text, seed=0)


def _compare(study: Study, folder: Path, world: World) -> tuple[list[Row], int]:
    return compare(measure_folder(folder, world.prompts, study.spec, minimum=2), world.reference)


def column(rows: Sequence[Row], side: str) -> dict[str, float | None]:
    """Map each metric to one side of its row (generated, reference or floor); None if the number is not finite."""
    return {row.metric: finite_or_none(getattr(row, side)) for row in rows}
