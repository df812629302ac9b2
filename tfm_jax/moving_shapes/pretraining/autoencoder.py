"""Stage one: trains the video autoencoder.

The loss, computed on windows of clips, is the mean squared error of the pixels plus the Kullback-Leibler divergence of
the latents with a small weight. Training starts with single frames, as Wan's did, because a step on single frames costs
a fifth of a step on video.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from tfm_jax import video
from tfm_jax.arrays import Scalar, Video
from tfm_jax.moving_shapes.pretraining.fitting import Batch, Stage, fit
from tfm_jax.moving_shapes.pretraining.network import initialise, make_optimizer
from tfm_jax.moving_shapes.pretraining.scenes import VAE_LAWS, Clips, Purpose, draw_clips, draw_scene
from tfm_jax.wan.components import VAE
from tfm_jax.wan.vae import VaeConfig, WanVae, run_in_chunks
from tfm_jax.wan.vae_layers import Cache, Chunk, Output

NUM_NORMALISED = 256
"""Number of clips whose latents give the mean and deviation."""


class Phase(NamedTuple):
    """A phase of the training, in which all windows have the same shape."""

    steps: int
    frames: int
    side: int
    """Height and width of the window in pixels."""
    batch: int


class VaeRecipe(NamedTuple):
    """Settings for training the autoencoder."""

    phases: Sequence[Phase]
    learning_rate: float = 1e-2
    """Peak value. After a short warm-up, the learning rate follows half a cosine to zero, over all phases."""
    vector_lr_factor: float = 0.2
    """Learning rate of norms and biases, relative to that of the kernels."""
    kl_weight: float = 3e-4
    """Weight of the divergence from a standard normal distribution. The divergence is in nats per latent value."""


class VaeState(NamedTuple):
    """What changes during the training."""

    weights: Any
    moments: Any


def train_vae(config: VaeConfig, recipe: VaeRecipe, seed: int, output: Path) -> WanVae:
    """Train an autoencoder, and store the mean and deviation of the latents of its clips in the configuration.

    The log, `vae.jsonl`, and the checkpoints are written into `output`.
    """
    vae = initialise(VAE, config, seed)
    graph, weights = nnx.split(vae)
    steps = sum(phase.steps for phase in recipe.phases)
    optimizer = make_optimizer(recipe.learning_rate, recipe.vector_lr_factor, steps)
    key = jax.random.key(seed)

    def batch_of(number: int) -> Batch:
        return Batch((_draw_windows(recipe, number, seed), jax.random.fold_in(key, number)), [])

    step_fn = jax.jit(partial(_step, graph, optimizer, recipe.kl_weight), donate_argnums=0)
    stage = Stage("vae", output, f"{config}, {recipe}, seed {seed}", recipe.phases[-1].batch, log_every=50)
    state = fit(stage, step_fn, VaeState(weights, optimizer.init(weights)), batch_of, steps)
    clips, _ = draw_clips(Purpose.NORMALISATION, seed, NUM_NORMALISED, VAE_LAWS)
    return _normalise(nnx.merge(graph, state.weights), clips)


def _draw_windows(recipe: VaeRecipe, number: int, seed: int) -> UInt8[np.ndarray, "b t y x 3"]:
    """Draw new scenes for step `number`, and a random window of each."""
    phase = _phase_of(recipe.phases, number)
    windows = []
    for row in range(phase.batch):
        pixels = draw_scene(Purpose.VAE, seed, number, row, laws=VAE_LAWS).pixels
        corner = np.random.default_rng((seed, number, row))
        t, y, x = corner.integers(np.subtract(pixels.shape[:3], (phase.frames, phase.side, phase.side)) + 1)
        windows.append(pixels[t : t + phase.frames, y : y + phase.side, x : x + phase.side])
    return np.stack(windows)


def _phase_of(phases: Sequence[Phase], number: int) -> Phase:
    """Return the phase of step `number`."""
    ends = np.cumsum([phase.steps for phase in phases])
    return phases[int(np.searchsorted(ends, number, side="right"))]


def _step(
    graph: nnx.GraphDef, optimizer: Any, kl_weight: float, state: VaeState,
    batch: tuple[UInt8[Array, "b t y x 3"], jax.Array],
) -> tuple[VaeState, dict[str, Scalar]]:  # fmt: skip
    pixels, key = batch[0].astype(jnp.float32) / 127.5 - 1, batch[1]

    def loss_of(weights: nnx.State) -> tuple[Scalar, dict[str, Scalar]]:
        vae: WanVae = nnx.merge(graph, weights)
        mean, log_variance = jnp.split(_posterior(vae, pixels), 2, axis=-1)
        noise = jax.random.normal(key, mean.shape)
        error = jnp.mean(jnp.square(_reconstruct(vae, mean + jnp.exp(log_variance / 2) * noise) - pixels))
        nats = jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance) / 2
        return error + kl_weight * nats, {"psnr": 10 * jnp.log10(4 / error), "nats": nats}

    (loss, terms), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.weights)
    updates, moments = optimizer.update(gradient, state.moments, state.weights)
    return VaeState(optax.apply_updates(state.weights, updates), moments), {"loss": loss, **terms}


def _posterior(vae: WanVae, pixels: Video) -> Float[Array, "b f h w two_z"]:
    """Return the mean and log-variance of the unnormalised latents."""

    def step(chunk: Chunk, cache: Cache) -> tuple[Output, Cache]:
        features, cache = vae.encoder(chunk, cache)
        mean, log_variance = jnp.split(vae.quant_conv(features), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_variance, -30, 20)], axis=-1), cache

    return run_in_chunks(step, pixels, frames_in=vae.config.time_stride, frames_out=1, unroll=True)


def _reconstruct(vae: WanVae, latents: Float[Array, "b f h w z"]) -> Video:
    """Decode unnormalised latents. The pixels are not clipped, so that all of them have a gradient."""

    def step(chunk: Chunk, cache: Cache) -> tuple[Output, Cache]:
        return vae.decoder(vae.post_quant_conv(chunk), cache)

    return run_in_chunks(step, latents, frames_in=1, frames_out=vae.config.time_stride, unroll=True)


def _normalise(vae: WanVae, clips: Clips) -> WanVae:
    """Set the mean and standard deviation of the latents of the clips, as if they were drawn from their posterior.

    The deviation of the posterior means alone would be tiny in a channel that carries no information, and dividing by
    it would blow up what is left in that channel.
    """
    mean, log_variance = np.split(_encode(vae, clips).reshape(-1, 2 * vae.config.z_dim).astype(np.float64), 2, axis=-1)
    std = np.sqrt(mean.var(0) + np.exp(log_variance).mean(0))
    statistics = (tuple(round(float(value), 4) for value in values) for values in (mean.mean(0), std))
    vae.config = dataclasses.replace(vae.config, **dict(zip(("latents_mean", "latents_std"), statistics, strict=True)))
    return vae


def encode_clips(vae: WanVae, clips: Clips) -> Float[np.ndarray, "n f h w z"]:
    """Return normalised latents, like `vae.encode`; for many short clips on a CPU, this function is faster."""
    mean, _ = np.split(_encode(vae, clips), 2, axis=-1)
    return (mean - np.array(vae.config.latents_mean, np.float32)) / np.array(vae.config.latents_std, np.float32)


def _encode(vae: WanVae, clips: Clips, batch: int = 8) -> Float[np.ndarray, "n f h w two_z"]:
    """Return the mean and log-variance of the unnormalised latents."""
    encode = jax.jit(lambda vae, pixels: _posterior(vae, pixels / 127.5 - 1))
    starts = tqdm(range(0, len(clips), batch), desc="encoding", unit="batch")
    return np.concatenate([np.asarray(encode(vae, clips[n : n + batch].astype(np.float32))) for n in starts])


def psnr(vae: WanVae, clips: Clips) -> float:
    """Return the peak signal-to-noise ratio, in dB, of reconstructing all clips, with pixels rounded to 8 bits."""
    squares = []
    for clip in clips:
        decoded = vae.decode(vae.encode(jnp.asarray(video.from_uint8(clip))[None]))
        pixels = video.to_uint8(np.asarray(decoded)[0])
        squares.append(np.square(pixels.astype(np.float64) - clip).mean())
    return float(10 * np.log10(255**2 / np.mean(squares)))
