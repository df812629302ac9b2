"""Formulas for motion, on centres in pixels, and for pixels in 0..255. None of them needs a network."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from tfm_jax.moving_shapes.evaluation import thresholds


class Motion(NamedTuple):
    """The motion of the objects of one clip."""

    speed: float
    """S = mean |V|, in pixels per frame, over frames and objects."""
    roughness: float
    """J = mean |A| / (mean |V| + STILLNESS)."""
    features: Float[np.ndarray, "n d"]
    """One row [V_1, V_2, ..., A_1, A_2, ...] for each object."""


def measure_motion(centres: Float[np.ndarray, "n t 2"]) -> Motion:
    """Compute V_t = c_{t+1} - c_t and A_t = V_{t+1} - V_t from at least three frames; NaN if a centre is NaN."""
    velocity, acceleration = np.diff(centres, axis=1), np.diff(centres, n=2, axis=1)
    speed = float(np.linalg.norm(velocity, axis=-1).mean())
    force = float(np.linalg.norm(acceleration, axis=-1).mean())
    features = np.concatenate([velocity, acceleration], 1).reshape(len(centres), -1)
    return Motion(speed, force / (speed + thresholds.STILLNESS), features)


def variation(mass: Float[np.ndarray, "t"]) -> float:
    """std M / mean M: 0 for an object of constant size."""
    return float(mass.std() / mass.mean())


def frechet(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Frechet distance between the normal distributions with the moments of a and b.

    |mu - mu'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2); NaN for fewer than two rows. It depends on the numbers of rows:
    compare it only with a floor computed from the same numbers.
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
    """Histogram of |x_{t+1} - x_t| over all pixels and colour channels."""
    changes = abs(np.diff(clip.astype(np.int16), axis=0))
    return np.bincount(changes.ravel(), minlength=256)


def wasserstein(a: Int[np.ndarray, "256"], b: Int[np.ndarray, "256"]) -> float:
    """Wasserstein-1 distance between two histograms over 0..255, in units of the full range: the area between CDFs."""
    return float(abs(np.cumsum(a / a.sum() - b / b.sum())).sum() / 255)
