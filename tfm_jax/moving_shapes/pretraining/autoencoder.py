"""Stage one: trains the video autoencoder.

The loss, computed on windows of clips, is the mean squared error of the pixels plus the Kullback-Leibler divergence of
the latents with a small weight. Training starts with single frames, as Wan's did, because a step on single frames costs
a fifth of a step on video.
"""

import dataclasses
from collections.abc import Iterator, Sequence
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
from tfm_jax.moving_shapes.pretraining.network import initialise, make_optimizer
from tfm_jax.train.metrics import Metrics
from tfm_jax.wan.components import VAE
from tfm_jax.wan.vae import VaeConfig, WanVae, run_in_chunks
from tfm_jax.wan.vae_layers import Cache, Chunk, Output

Clips = UInt8[np.ndarray, "n t y x 3"]


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
    kl_weight: float = 3e-5
    """Weight of the divergence from a standard normal distribution. The divergence is in nats per latent value."""


def train_vae(clips: Clips, config: VaeConfig, recipe: VaeRecipe, seed: int, log: Path) -> WanVae:
    """Train an autoencoder on clips, and store the mean and deviation of their latents in the configuration.

    Args:
        log: JSON Lines file for the metrics of every step.
    """
    vae = initialise(VAE, config, seed)
    graph, weights = nnx.split(vae)
    steps = sum(phase.steps for phase in recipe.phases)
    optimizer = make_optimizer(recipe.learning_rate, recipe.vector_lr_factor, steps)
    step_fn = jax.jit(partial(_step, graph, optimizer, recipe.kl_weight), donate_argnums=(0, 1))
    moments = optimizer.init(weights)
    with Metrics(log, 0, steps, 1, log_every=50) as metrics:
        for number, (batch, chosen) in enumerate(_windows(clips, recipe.phases, seed)):
            key = jax.random.fold_in(jax.random.key(seed), number)
            weights, moments, report = step_fn(weights, moments, jnp.asarray(batch), key)
            metrics.add(number + 1, report, chosen)
        metrics.flush()
    return _normalise(nnx.merge(graph, weights), clips)


def _windows(clips: Clips, phases: Sequence[Phase], seed: int) -> Iterator[tuple[UInt8[np.ndarray, "b t y x 3"], Any]]:
    """Yield, for every step, a batch of random windows and the indices of their clips."""
    rng = np.random.default_rng(seed)
    for phase in phases:
        for _ in range(phase.steps):
            chosen = rng.integers(len(clips), size=phase.batch)
            places = np.subtract(clips.shape[1:4], (phase.frames, phase.side, phase.side)) + 1
            corners = rng.integers(places.astype(np.int64), size=(phase.batch, 3))
            yield np.stack([
                clips[n, t : t + phase.frames, y : y + phase.side, x : x + phase.side]
                for n, (t, y, x) in zip(chosen, corners, strict=True)
            ]), chosen.tolist()  # fmt: skip


def _step(
    graph: nnx.GraphDef, optimizer: Any, kl_weight: float, weights: nnx.State, moments: Any,
    batch: UInt8[Array, "b t y x 3"], key: jax.Array,
) -> tuple[nnx.State, Any, dict[str, Scalar]]:  # fmt: skip
    pixels = batch.astype(jnp.float32) / 127.5 - 1

    def loss_of(weights: nnx.State) -> tuple[Scalar, dict[str, Scalar]]:
        vae: WanVae = nnx.merge(graph, weights)
        mean, log_variance = jnp.split(_posterior(vae, pixels), 2, axis=-1)
        noise = jax.random.normal(key, mean.shape)
        error = jnp.mean(jnp.square(_reconstruct(vae, mean + jnp.exp(log_variance / 2) * noise) - pixels))
        nats = jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance) / 2
        return error + kl_weight * nats, {"psnr": 10 * jnp.log10(4 / error), "nats": nats}

    (loss, terms), gradient = jax.value_and_grad(loss_of, has_aux=True)(weights)
    updates, moments = optimizer.update(gradient, moments, weights)
    return optax.apply_updates(weights, updates), moments, {"loss": loss, **terms}  # pyright: ignore[reportReturnType]


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


def _normalise(vae: WanVae, clips: Clips, count: int = 256) -> WanVae:
    """Set the statistics with which the latents of the first `count` clips have mean 0 and standard deviation 1."""
    values = _means(vae, clips[:count]).reshape(-1, vae.config.z_dim).astype(np.float64)
    mean, std = (tuple(round(float(v), 4) for v in numbers) for numbers in (values.mean(0), values.std(0)))
    vae.config = dataclasses.replace(vae.config, latents_mean=mean, latents_std=std)
    return vae


def encode_clips(vae: WanVae, clips: Clips) -> Float[np.ndarray, "n f h w z"]:
    """Return normalised latents, like `vae.encode`; for many short clips on a CPU, this function is faster."""
    return (_means(vae, clips) - np.array(vae.config.latents_mean, np.float32)) / np.array(
        vae.config.latents_std, np.float32
    )


def _means(vae: WanVae, clips: Clips, batch: int = 8) -> Float[np.ndarray, "n f h w z"]:
    means = jax.jit(lambda vae, pixels: jnp.split(_posterior(vae, pixels / 127.5 - 1), 2, axis=-1)[0])
    starts = tqdm(range(0, len(clips), batch), desc="encoding", unit="batch")
    return np.concatenate([np.asarray(means(vae, clips[n : n + batch].astype(np.float32))) for n in starts])


def psnr(vae: WanVae, clips: Clips) -> float:
    """Return the peak signal-to-noise ratio, in dB, of reconstructing all clips, with pixels rounded to 8 bits."""
    squares = []
    for clip in clips:
        decoded = vae.decode(vae.encode(jnp.asarray(video.from_uint8(clip))[None]))
        pixels = video.to_uint8(np.asarray(decoded)[0])
        squares.append(np.square(pixels.astype(np.float64) - clip).mean())
    return float(10 * np.log10(255**2 / np.mean(squares)))
