"""Training checkpoints that are verified when they are read, so that a damaged one is never used."""

from tfm_jax.checkpoint.fingerprints import fingerprints
from tfm_jax.checkpoint.manager import Checkpoints
from tfm_jax.checkpoint.reading import MakeTarget, Restored
from tfm_jax.checkpoint.trees import Arrays, flatten, unflatten

__all__ = ["Arrays", "Checkpoints", "MakeTarget", "Restored", "fingerprints", "flatten", "unflatten"]
