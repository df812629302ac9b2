"""Formulas for motion (object centres in pixels) and for pixel values in 0..255. None of them needs a network."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from tfm_jax.moving_shapes.evaluation import thresholds


class Motion(NamedTuple):
    """The motion of the objects in one clip, with velocities V and accelerations A."""

    speed: float
    """S = mean |V| over frames and objects, in pixels per frame."""
    roughness: float
    """J = mean |A| / (mean |V| + STILLNESS)."""
    features: Float[np.ndarray, "n d"]
    """One row [V_1, V_2, ..., A_1, A_2, ...] per object."""


def measure_motion(centres: Float[np.ndarray, "n t 2"]) -> Motion:
    """Measure motion with V_t = c_{t+1} - c_t and A_t = V_{t+1} - V_t, which need at least three frames.

    Speed and roughness are NaN if a centre is NaN.
    """
    velocity, acceleration = np.diff(centres, axis=1), np.diff(centres, n=2, axis=1)
    speed = float(np.linalg.norm(velocity, axis=-1).mean())
    force = float(np.linalg.norm(acceleration, axis=-1).mean())
    features = np.concatenate([velocity, acceleration], 1).reshape(len(centres), -1)
    return Motion(speed, force / (speed + thresholds.STILLNESS), features)


def variation(mass: Float[np.ndarray, "t"]) -> float:
    """Return std M / mean M of the mass M: 0 for an object of constant size."""
    return float(mass.std() / mass.mean())


def frechet(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Return the squared Frechet distance between normal distributions with the means and covariances of a and b.

    |mu - mu'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2); NaN if a or b has fewer than two rows. The distance depends on
    the number of rows, so compare it only with a floor computed from equally many rows.
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
    """Return the histogram of |x_{t+1} - x_t| over all pixels and colour channels."""
    changes = abs(np.diff(clip.astype(np.int16), axis=0))
    return np.bincount(changes.ravel(), minlength=256)


def wasserstein(a: Int[np.ndarray, "256"], b: Int[np.ndarray, "256"]) -> float:
    """Return the Wasserstein-1 distance between two histograms over 0..255, as a fraction of the full range.

    This is the area between the two cumulative distribution functions.
    """
    return float(abs(np.cumsum(a / a.sum() - b / b.sum())).sum() / 255)
