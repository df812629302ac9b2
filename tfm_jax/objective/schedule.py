"""Noise levels: the shifted grid, the loss weight of each level, and how training draws levels.

Level k of the grid has sigma_k = shift_sigma(1 - k / LEVELS), so that k = 0 is pure noise. The network receives the
timestep t = 1000 sigma. Tables are computed in float64 with NumPy, then rounded to float32.
"""

from statistics import NormalDist
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tfm_jax.arrays import PerVideo
from tfm_jax.config import ObjectiveConfig
from tfm_jax.errors import InputError

LEVELS = 1000
MIN_SNR_GAMMA = 5.0
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


# --- Loss weights ----------------------------------------------------------------------------------------------------


def bell_weights(shift: float = 5.0) -> Table:
    """Return the loss weight of every grid index in float32: a bell curve around t = 500 with minimum 0 and sum LEVELS.

    The curve is exp(-2 ((t_k - 500) / 1000)^2) minus its minimum over the grid, scaled to that sum. The weights depend
    only on the grid, not on the levels in a batch.
    """
    bell = np.exp(-2 * np.square(_grid(shift) - 0.5))
    bell -= bell.min()
    return (bell * (LEVELS / bell.sum())).astype(np.float32)


def equal_weights(shift: float) -> Table:
    """Return a loss weight of 1 for every grid index."""
    return np.ones(LEVELS, np.float32)


def min_snr_weights(shift: float) -> Table:
    """Return the min-SNR weight (Hang et al. 2023, gamma = 5) of every grid index in float32, scaled to the sum LEVELS.

    They weight the squared error of the clean latents by min(SNR, gamma), with SNR = ((1 - sigma) / sigma)^2. In plain
    flow matching, the clean latents are x_t - sigma v, so their squared error is sigma^2 times that of the velocity v,
    and the weight of the latter is min((1 - sigma)^2, gamma sigma^2).
    """
    sigma = _grid(shift)
    weights = np.minimum(np.square(1 - sigma), MIN_SNR_GAMMA * np.square(sigma))
    return (weights * (LEVELS / weights.sum())).astype(np.float32)


WEIGHTS = {"bell": bell_weights, "none": equal_weights, "min_snr": min_snr_weights}
"""`objective.weight` -> the table of weights for a shift."""


# --- Drawing ---------------------------------------------------------------------------------------------------------


def sample_index(key: jax.Array, batch: int, config: ObjectiveConfig) -> Int[Array, "b"]:
    """Draw one grid index per video, by `config.law`, from the part of the grid between the fractions `low` and `high`.

    The grid runs from pure noise (fraction 0) to clean (fraction 1); `high` is exclusive.

    Raises:
        InputError: the interval contains no level, or no level that the law draws.
    """
    first, last = round(config.low * LEVELS), round(config.high * LEVELS)
    if not first < last:
        raise InputError(
            f"objective.low={config.low}, objective.high={config.high}: expected low < high, at least {1 / LEVELS} "
            "apart"
        )
    if config.law == "uniform":
        return jax.random.randint(key, (batch,), first, last, jnp.int32)  # int32 even with jax_enable_x64
    share = logit_normal(config.logit_mean, config.logit_std)[first:last]
    if not share.sum() > 0:
        law = f"objective.logit_mean={config.logit_mean}, objective.logit_std={config.logit_std}"
        raise InputError(f"{law}: draw no level between low={config.low} and high={config.high}; expected others")
    upper = jnp.asarray((share.cumsum() / share.sum()).astype(np.float32))
    drawn = jnp.searchsorted(upper, jax.random.uniform(key, (batch,), jnp.float32), side="right")
    return (first + jnp.minimum(drawn, last - first - 1)).astype(jnp.int32)


def logit_normal(mean: float, std: float) -> Float[np.ndarray, "levels"]:
    """Return the probability of every grid index if the logit of the noise level, before the shift, is N(mean, std).

    Level k stands for the noise levels from 1 - (k + 1) / LEVELS to 1 - k / LEVELS (Esser et al. 2024, section 3.1).
    """
    edges = 1 - np.arange(1, LEVELS) / LEVELS
    below = [NormalDist(mean, std).cdf(x) for x in np.log(edges / (1 - edges))]
    return -np.diff([1.0, *below, 0.0])


def timestep(sigma: PerVideo) -> PerVideo:
    """Return the timestep in 0..1000 that the network receives for a noise level in 0..1."""
    return TIMESTEPS * sigma


def _grid(shift: float) -> Table:
    return shift_sigma(1 - np.arange(LEVELS, dtype=np.float64) / LEVELS, shift)
