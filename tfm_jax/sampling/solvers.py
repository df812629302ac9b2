"""Solvers of the flow ODE dx / dsigma = velocity, from noise (sigma 1) to clean (sigma 0)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tfm_jax.arrays import Latents, Scalar
from tfm_jax.objective import shift_sigma

Levels = Float[Array, "n"]


def noise_levels(steps: int, shift: float) -> Levels:
    """The `steps + 1` levels of a sampling run, from 1 to 0: even steps, shifted towards the noise."""
    even = np.linspace(1.0, 0.0, steps + 1)
    return jnp.asarray(shift_sigma(even, shift), jnp.float32)


def euler(velocity: Callable[[Latents, Scalar], Latents], noise: Latents, levels: Levels) -> Latents:
    """One Euler step between every two levels; float32 throughout.

    Args:
        velocity: (latents, sigma) -> velocity `noise - clean`.
    """

    def step(x: Latents, pair: tuple[Scalar, Scalar]) -> tuple[Latents, None]:
        sigma, following = pair
        return x + (following - sigma) * velocity(x, sigma), None

    x, _ = jax.lax.scan(step, noise, (levels[:-1], levels[1:]))
    return x
