"""Solve the flow ODE dx / dsigma = velocity, from noise (sigma = 1) to clean latents (sigma = 0)."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from jaxtyping import Float32

from tfm_jax.arrays import Latents
from tfm_jax.objective import shift_sigma

Levels = Float32[np.ndarray, "n"]


def noise_levels(steps: int, shift: float) -> Levels:
    """Return the `steps + 1` noise levels of a sampling run, from 1 to 0: evenly spaced, then shifted towards noise."""
    even = np.linspace(1.0, 0.0, steps + 1)
    return shift_sigma(even, shift).astype(np.float32)


def euler(velocity: Callable[[Latents, np.float32], Latents], noise: Latents, levels: Levels) -> Latents:
    """Integrate the velocity from `noise`, with one Euler step from each level to the next, in float32.

    Args:
        velocity: maps (latents, sigma) to the velocity, an estimate of `noise - clean`.
    """
    x = noise
    for sigma, following in pairwise(levels):
        x = x + (following - sigma) * velocity(x, sigma)
    return x
