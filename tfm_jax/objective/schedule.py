"""Noise levels: the shifted grid, the law of the training timestep and the weight of each level.

Level k of LEVELS has sigma_k = shift_sigma(1 - k / LEVELS); k = 0 is pure noise. The network is given
t = 1000 sigma. Tables are computed in float64 on the host and rounded to float32 once.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tfm_jax.arrays import PerVideo
from tfm_jax.errors import InputError

LEVELS = 1000
TIMESTEPS = 1000.0  # the network's timestep of pure noise

Table = Float[np.ndarray, "levels"]
Sigma = TypeVar("Sigma", Float[np.ndarray, "..."], Float[Array, "..."])


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """Move noise levels in 0..1 towards the noise: shift sigma / (1 + (shift - 1) sigma). shift = 1 changes nothing.

    Args:
        sigma: noise levels of any shape, evenly spaced for the sampling grid.
        shift: 5 for Wan2.1 at 480p and for TFM.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(shift: float = 5.0) -> Table:
    """The noise level of every grid index, float32, falling from 1 to shift / (shift + LEVELS - 1)."""
    return _grid(shift).astype(np.float32)


def weights(shift: float = 5.0) -> Table:
    """The loss weight of every grid index, float32: a bell around t = 500, minimum 0, sum LEVELS.

    y_k = exp(-2 ((t_k - 500) / 1000)^2), less its minimum over the grid, scaled. A property of the grid: the
    levels that happen to be in a batch do not change it.
    """
    bell = np.exp(-2 * np.square(_grid(shift) - 0.5))
    bell -= bell.min()
    return (bell * (LEVELS / bell.sum())).astype(np.float32)


def sample_index(key: jax.Array, batch: int, low: float = 0.0, high: float = 1.0) -> Int[Array, "b"]:
    """One grid index per video, uniform over the part [low, high) of the grid; 0 is the noisy end.

    Raises:
        InputError: the part holds no level or leaves the grid.
    """
    first, last = round(low * LEVELS), round(high * LEVELS)
    if not 0 <= first < last <= LEVELS:
        raise InputError(
            f"objective.low={low}, objective.high={high}: expected 0 <= low < high <= 1, at least {1 / LEVELS} apart"
        )
    return jax.random.randint(key, (batch,), first, last, jnp.int32)  # the same numbers with 64-bit integers on


def timestep(sigma: PerVideo) -> PerVideo:
    """The network's timestep t in 0..1000 of a noise level in 0..1."""
    return TIMESTEPS * sigma


def _grid(shift: float) -> Table:
    return shift_sigma(1 - np.arange(LEVELS, dtype=np.float64) / LEVELS, shift)
