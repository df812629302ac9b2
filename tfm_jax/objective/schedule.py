"""Noise levels: the shifted grid, how training samples it, and the loss weight of each level.

Level k of the grid has sigma_k = shift_sigma(1 - k / LEVELS), so that k = 0 is pure noise. The network receives the
timestep t = 1000 sigma. Tables are computed in float64 with NumPy, then rounded to float32.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tfm_jax.arrays import PerVideo
from tfm_jax.errors import InputError

LEVELS = 1000
TIMESTEPS = 1000.0  # timestep of pure noise

Table = Float[np.ndarray, "levels"]
Sigma = TypeVar("Sigma", Float[np.ndarray, "..."], Float[Array, "..."])


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """Shift noise levels in 0..1, towards pure noise if shift > 1: shift * sigma / (1 + (shift - 1) * sigma).

    Args:
        sigma: noise levels, of any shape.
        shift: 5 for Wan2.1 at 480p and for TFM; 1 means no shift.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(shift: float = 5.0) -> Table:
    """Return the noise level of every grid index in float32, decreasing from 1 to shift / (shift + LEVELS - 1)."""
    return _grid(shift).astype(np.float32)


def weights(shift: float = 5.0) -> Table:
    """Return the loss weight of every grid index in float32: a bell curve around t = 500 with minimum 0 and sum LEVELS.

    The curve is exp(-2 ((t_k - 500) / 1000)^2) minus its minimum over the grid, scaled to that sum. The weights depend
    only on the grid, not on the levels in a batch.
    """
    bell = np.exp(-2 * np.square(_grid(shift) - 0.5))
    bell -= bell.min()
    return (bell * (LEVELS / bell.sum())).astype(np.float32)


def sample_index(key: jax.Array, batch: int, low: float = 0.0, high: float = 1.0) -> Int[Array, "b"]:
    """Draw one grid index per video, uniformly from the part of the grid between the fractions `low` and `high`.

    The grid runs from pure noise (fraction 0) to clean (fraction 1); `high` is exclusive.

    Raises:
        InputError: the interval contains no level, or extends beyond the grid.
    """
    first, last = round(low * LEVELS), round(high * LEVELS)
    if not 0 <= first < last <= LEVELS:
        raise InputError(
            f"objective.low={low}, objective.high={high}: expected 0 <= low < high <= 1, at least {1 / LEVELS} apart"
        )
    return jax.random.randint(key, (batch,), first, last, jnp.int32)  # int32 even with jax_enable_x64


def timestep(sigma: PerVideo) -> PerVideo:
    """Return the timestep in 0..1000 that the network receives for a noise level in 0..1."""
    return TIMESTEPS * sigma


def _grid(shift: float) -> Table:
    return shift_sigma(1 - np.arange(LEVELS, dtype=np.float64) / LEVELS, shift)
