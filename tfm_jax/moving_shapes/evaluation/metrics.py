"""Numbers about motion, from centres in pixels and pixels in 0..255; no network is needed for any of them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from tfm_jax.moving_shapes.evaluation import thresholds


class Motion(NamedTuple):
    """How one clip moves."""

    speed: float
    """S = mean |V|, pixels a frame, over frames and objects."""
    roughness: float
    """J = mean |A| / (mean |V| + STILLNESS)."""
    features: Float[np.ndarray, "n d"]
    """A row [V_1, V_2, ..., A_1, A_2, ...] for each object."""


def measure_motion(centres: Float[np.ndarray, "n t 2"]) -> Motion:
    """V_t = c_{t+1} - c_t, A_t = V_{t+1} - V_t; at least three frames, and an object in every one of them."""
    velocity, acceleration = np.diff(centres, axis=1), np.diff(centres, n=2, axis=1)
    speed = float(np.linalg.norm(velocity, axis=-1).mean())
    force = float(np.linalg.norm(acceleration, axis=-1).mean())
    features = np.concatenate([velocity, acceleration], 1).reshape(len(centres), -1)
    return Motion(speed, force / (speed + thresholds.STILLNESS), features)


def variation(mass: Float[np.ndarray, "t"]) -> float:
    """std M / mean M: 0 for an object that stays as large as it is."""
    return float(mass.std() / mass.mean())


def frechet(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2) of the normal distributions with the moments of a and b.

    NaN for fewer than two rows. It depends on the numbers of rows: compare it only with a floor at the same ones.
    """
    if min(len(a), len(b)) < 2:
        return np.nan
    gap = a.mean(0) - b.mean(0)
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = _square_root(covariance_a)
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(0))
    return float(gap @ gap + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross.sum())


def _square_root(matrix: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def count_changes(clip: UInt8[np.ndarray, "t y x 3"]) -> Int[np.ndarray, "256"]:
    """How often each value of |x_{t+1} - x_t| occurs, over all pixels and colour channels."""
    changes = abs(np.diff(clip.astype(np.int16), axis=0))
    return np.bincount(changes.ravel(), minlength=256)


def wasserstein(a: Int[np.ndarray, "256"], b: Int[np.ndarray, "256"]) -> float:
    """Wasserstein-1 between two histograms over 0..255, for pixels in 0..1: the area between the distributions."""
    return float(abs(np.cumsum(a / a.sum() - b / b.sum())).sum() / 255)
