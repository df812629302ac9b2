"""Measures the sensitivity of a network to the order of frames: how much a loss grows if the frames are permuted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tfm_jax.arrays import Latents, Text
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.objective import timestep
from tfm_jax.objective.losses import OBJECTIVES

Levels = Float[Array, "levels"]


def measure_sensitivity(
    transformer: Any, latents: Float[np.ndarray, "b f h w c"], text: Float[np.ndarray, "b l d"], seed: int
) -> dict[str, list[float]]:
    """Return the mean of SENSITIVITY_LOSS over the clips at each of SIGMAS, with "ordered" and "permuted" frames.

    The latent frames of each clip are permuted at random, never into the true order; the noise is not permuted.
    """
    rng = np.random.default_rng(seed)
    order = np.stack([_draw_permutation(rng, latents.shape[1]) for _ in latents])
    noise = rng.normal(size=latents.shape).astype(np.float32)
    clips = jnp.asarray(latents), jnp.asarray(np.take_along_axis(latents, order[:, :, None, None, None], 1))
    sigmas = jnp.asarray(protocol.SIGMAS, jnp.float32)
    losses = [_losses(transformer, clean, jnp.asarray(noise), jnp.asarray(text), sigmas) for clean in clips]
    return dict(zip(("ordered", "permuted"), (np.asarray(loss).tolist() for loss in losses), strict=True))


@jax.jit
def _losses(transformer: Any, clean: Latents, noise: Latents, text: Text, sigmas: Levels) -> Levels:
    config = protocol.SENSITIVITY_LOSS
    objective = OBJECTIVES[config.kind]

    def at(sigma: Float[Array, ""]) -> Float[Array, ""]:
        each = jnp.full(len(clean), sigma)
        loss, _ = objective(lambda x_t: transformer(x_t, timestep(each), text), clean, noise, each, config)
        return jnp.mean(loss)

    return jax.lax.map(at, sigmas)


def _draw_permutation(rng: np.random.Generator, frames: int) -> Int[np.ndarray, "f"]:
    """Draw a permutation other than the identity."""
    while True:
        order = rng.permutation(frames)
        if (order != np.arange(frames)).any():
            return order
