"""Lower the programs of a run from its configuration alone: the arguments have shapes and shardings, but no values."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from tfm_jax import config as configs
from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.config import section
from tfm_jax.data.batches import Batch
from tfm_jax.data.buckets import list_buckets
from tfm_jax.lora.adapters import attach_lora, split_lora
from tfm_jax.sampling.loop import guided_velocity
from tfm_jax.sampling.outputs import SampleRun
from tfm_jax.sharding import (
    batch_mesh,
    batch_sharding,
    check_batch,
    check_split,
    num_shards,
    replicated,
    shardings,
)
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.train.step import TrainState, init_state, make_step
from tfm_jax.wan.components import TEXT_ENCODER, TRANSFORMER, VAE, Component, abstract_model
from tfm_jax.wan.quantization import quantize_linears
from tfm_jax.wan.sources import find_source_or_none
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer, token_grid
from tfm_jax.wan.vae import VaeConfig, WanVae


@section
class TrainPlan(configs.TrainingSections):
    """The sections of a configuration that determine the program of a training step."""

    mesh: configs.MeshConfig = dataclasses.field(default_factory=configs.MeshConfig)


@section
class SamplePlan(SampleRun):
    """The sections of a configuration that determine the program of a sampling step.

    The program has adapters unless `sampling.lora` is null.
    """

    lora: configs.LoraConfig = dataclasses.field(default_factory=configs.LoraConfig)


@functools.cache
def _config_of_weights(path: Path, component: Component) -> Any:
    """Return the configuration of a network from its weights; None without weights."""
    found = find_source_or_none(path, component) if path.exists() else None
    return found.config if found else None


def transformer_config(model: configs.ModelConfig) -> TransformerConfig:
    """Return the transformer's configuration. The width and the number of the text tokens are those of the weights;
    without weights, those of Wan2.1-T2V."""
    found = _config_of_weights(model.path, TRANSFORMER)
    config = TransformerConfig(model.dim, model.ffn_dim, model.heads, model.layers)
    return dataclasses.replace(config, text_dim=found.text_dim, text_len=found.text_len) if found else config


def latent_shape(run: TrainPlan | SamplePlan) -> tuple[int, int, int, int]:
    """Return the frames, height, width and channels of the latents of one clip. Training clips have the largest size
    that the configuration allows."""
    sizes = [bucket.latent_size for bucket in list_buckets(run.clip)] if isinstance(run, TrainPlan) else []
    return *max(sizes, key=math.prod, default=run.clip.latent_size), transformer_config(run.model).channels


def num_tokens(run: TrainPlan | SamplePlan) -> int:
    """Return the number of video tokens of one clip."""
    return math.prod(token_grid(latent_shape(run)))


def num_clips(run: TrainPlan | SamplePlan, mesh: Mesh) -> int:
    """Return the number of clips in one call of the program. Sampling takes one per shard of the batch."""
    return run.train.clips_per_step if isinstance(run, TrainPlan) else num_shards("batch", mesh)


def check_mesh(run: TrainPlan | SamplePlan, mesh: Mesh | AbstractMesh) -> None:
    """Raise InputError if the mesh cannot split the model, the clip or the batch."""
    if isinstance(run, TrainPlan):
        check_batch(run.train.batch_size, mesh)
    check_split(run.model.heads, num_tokens(run), mesh)


class Program(NamedTuple):
    """A program that can be compiled. Sizes are in bytes per device."""

    lowered: jax.stages.Lowered
    arguments: int
    weights: int
    """Size of the network among the arguments."""


def lower(run: TrainPlan | SamplePlan, mesh: Mesh) -> Program:
    """Return the training step, or a denoising step.

    Raises:
        InputError: the mesh cannot split the model, the clip, the batch or a parameter.
    """
    check_mesh(run, mesh)
    return _training_step(run, mesh) if isinstance(run, TrainPlan) else _denoising_step(run, mesh)


def _training_step(run: TrainPlan, mesh: Mesh) -> Program:
    model = _abstract_model(run.model)
    attach_lora(model, run.lora)
    graph, lora, frozen = split_lora(model)
    # The program depends on the number of steps only in a constant, so with train.epochs any number will do.
    optimizer = make_optimizer(run.optimizer, run.train.steps or run.optimizer.warmup_steps + 1)
    settings = run.train
    state, placement = _initial_state(lora, optimizer, mesh, settings.ema_decay is not None)
    step: Any = make_step(
        graph, optimizer, run.objective, settings.seed, placement, settings.remat, settings.accumulate,
        settings.ema_decay,
    )  # fmt: skip
    clips = settings.clips_per_step
    batch = Batch(_abstract_batch((clips, *latent_shape(run)), mesh), _abstract_text(clips, run.model, mesh))
    args = (_with_shardings(state, placement), _with_shardings(frozen, shardings(frozen, mesh)), batch)
    with jax.set_mesh(mesh):
        return Program(step.lower(*args), _bytes_per_device(args), _bytes_per_device(args[1]))


def _denoising_step(run: SamplePlan, mesh: Mesh) -> Program:
    settings = run.sampling
    model = _abstract_model(run.model)
    if settings.lora:
        attach_lora(model, run.lora)
    model = _placed(model, mesh)
    videos = num_shards("batch", mesh)
    text = _abstract_text(videos, run.model, mesh)
    sigma = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    args = (model, _abstract_batch((videos, *latent_shape(run)), mesh), sigma, text, text)
    program: Any = guided_velocity
    with jax.set_mesh(mesh):
        lowered = program.lower(*args, guidance=settings.guidance)
    return Program(lowered, _bytes_per_device(args), _bytes_per_device(model))


def prompt_encoding(run: SamplePlan, mesh: Mesh) -> Program:
    """Return the program that encodes one prompt for each shard of a batch."""
    config = _config_of_weights(run.model.path, TEXT_ENCODER) or TextEncoderConfig()
    encoder: Any = _placed(abstract_model(TEXT_ENCODER, config, jnp.dtype(run.model.dtype)), mesh)
    ids, call = _abstract_batch((num_shards("batch", mesh), TEXT_LENGTH), mesh, jnp.int32), UMT5Encoder.__call__
    with jax.set_mesh(mesh):
        lowered = call.lower(encoder, ids, ids)
    return Program(lowered, _bytes_per_device((encoder, ids, ids)), _bytes_per_device(encoder))


def decoded_size(run: SamplePlan) -> tuple[int, int, int]:
    """Return the height, width and channels of the latents that the decoder decodes at once: of a frame or a tile."""
    _, height, width, channels = latent_shape(run)
    tile = run.sampling.tile or (height, width)
    return min(tile[0], height), min(tile[1], width), channels


def decoding(path: Path, size: tuple[int, int, int], device: Any) -> Program:
    """Return the program that decodes a latent frame after the first. It is the same for every device that decodes.

    Args:
        path: directory of the model; it may be missing.
        size: see `decoded_size`.
    """
    mesh = batch_mesh([device])
    config = _config_of_weights(path, VAE) or VaeConfig()
    vae: Any = _placed(abstract_model(VAE, config, jnp.float32), mesh)
    frame = _abstract_batch((1, 1, *size), mesh)
    with jax.set_mesh(mesh):
        _, cache = jax.eval_shape(WanVae.decode_chunk, vae, frame, None)
        cache = jax.tree.map(lambda x: _abstract_batch(x.shape, mesh), cache)
        lowered = WanVae.decode_chunk.lower(vae, frame, cache)
    return Program(lowered, _bytes_per_device((vae, frame, cache)), _bytes_per_device(vae))


def _placed(model: nnx.Module, mesh: Mesh) -> Any:
    """Return the network with the shardings of its parameters."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, _with_shardings(state, shardings(state, mesh)))


def _abstract_model(model: configs.ModelConfig) -> WanTransformer:
    network: Any = abstract_model(TRANSFORMER, transformer_config(model), jnp.dtype(model.dtype))
    if model.quantize:
        network.blocks = nnx.eval_shape(quantize_linears, network.blocks)
    return network


def _initial_state(
    lora: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh, ema: bool
) -> tuple[TrainState, TrainState]:
    """Return the shapes of the state before the first step, and its shardings."""
    placements = []  # eval_shape can return only arrays, not shardings

    def init(lora: nnx.State) -> TrainState:
        state, placement = init_state(lora, optimizer, mesh, ema)
        placements.append(placement)
        return state

    return jax.eval_shape(init, lora), placements[0]


def _abstract_batch(shape: tuple[int, ...], mesh: Mesh, dtype: DTypeLike = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _abstract_text(videos: int, model: configs.ModelConfig, mesh: Mesh) -> Any:
    config = transformer_config(model)
    return _abstract_batch((videos, config.text_len, config.text_dim), mesh)


def _with_shardings(shapes: Any, placement: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, placement
    )


def _bytes_per_device(args: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(args))
