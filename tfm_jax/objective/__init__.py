"""The training objectives: noise levels, the TFM path and loss, and plain flow matching."""

from tfm_jax.objective.losses import Draws, draw, objective_loss
from tfm_jax.objective.schedule import LEVELS, shift_sigma, timestep
from tfm_jax.objective.temporal import TemporalPath, temporal_loss, temporal_path

__all__ = [
    "LEVELS",
    "Draws",
    "TemporalPath",
    "draw",
    "objective_loss",
    "shift_sigma",
    "temporal_loss",
    "temporal_path",
    "timestep",
]
