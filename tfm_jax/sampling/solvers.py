"""Solve the flow ODE dx / dsigma = velocity, from noise (sigma = 1) to clean latents (sigma = 0).

All solvers have the same form. A step begins at latents x of noise level sigma. The network's velocity gives an
estimate of the clean latents, `x - sigma velocity`, and the next latents are a weighted sum of what is known by then. A
solver is therefore a table of weights, which is computed before the first step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from tfm_jax.arrays import Latents, Scalar
from tfm_jax.config import Solver
from tfm_jax.objective import LEVELS, shift_sigma

Levels = Float32[np.ndarray, "n"]
Velocity = Callable[[Latents, Scalar, Int[Array, ""]], Latents]
"""Maps latents, their noise level and the number of the step to the velocity, an estimate of `noise - clean`."""


class Steps(NamedTuple):
    """The steps of a solver; every array has a row for each step.

    Step k knows the latents x, the estimate `clean` at x, the point `start` at which step k - 1 began, and the
    estimates `last` and `before` of the two steps before. It first corrects x, then takes the step:

        start = correct . (x, start, clean, last, before)
        x = advance . (start, clean, last)
    """

    sigma: Float[Array | np.ndarray, "n"]
    """Noise level of x."""
    level: Float[Array | np.ndarray, "n"]
    """Noise level that is passed to the network."""
    correct: Float[Array | np.ndarray, "n 5"]
    advance: Float[Array | np.ndarray, "n 3"]


class State(NamedTuple):
    """The state of a solver between two steps, with the names of `Steps`."""

    number: Int[Array, ""]
    """Number of the next step."""
    x: Latents
    start: Latents
    last: Latents
    before: Latents


def noise_levels(steps: int, shift: float) -> Levels:
    """Return the `steps + 1` noise levels of Euler sampling, from 1 to 0: evenly spaced, then shifted towards noise."""
    even = np.linspace(1.0, 0.0, steps + 1)
    return shift_sigma(even, shift).astype(np.float32)


def make_steps(solver: Solver, steps: int, shift: float) -> Steps:
    """Return the steps of a solver on the shifted grid.

    euler: the TFM release. unipc: order 2 with B(h) = expm1(-h) (Zhao et al. 2023), the solver of Wan2.1; the levels,
    the integer timesteps and the weights are those of diffusers' UniPCMultistepScheduler with flow sigmas. dpmpp_2m:
    the same without the corrector, which is DPM-Solver++(2M) (Lu et al. 2022).
    """
    if solver == "euler":
        levels = noise_levels(steps, shift)
        return _table(levels[:-1], levels, np.zeros(steps), _no_correction(steps))
    shifted = shift_sigma(np.linspace(1, 1 / LEVELS, steps + 1)[:-1], shift)
    shifted[0] -= 1e-6  # at 1, the logarithm of the signal-to-noise ratio would be infinite
    told = np.floor(LEVELS * shifted) / LEVELS
    levels = np.append(shifted, 0).astype(np.float32)
    correct = _correction(levels) if solver == "unipc" else _no_correction(steps)
    return _table(told, levels, _share_of_last(levels), correct)


def begin(noise: Latents) -> State:
    """Return the state before the first step. Its weights ignore the earlier latents, which do not exist."""
    return State(jnp.zeros((), jnp.int32), noise, noise, noise, noise)


def take_step(velocity: Velocity, steps: Steps, state: State) -> State:
    """Take the next step, in the dtype of the state."""
    row = jax.tree.map(lambda column: jnp.asarray(column)[state.number], steps)
    clean = state.x - row.sigma * velocity(state.x, row.level, state.number)
    start = _weighted_sum(row.correct, state.x, state.start, clean, state.last, state.before)
    x = _weighted_sum(row.advance, start, clean, state.last)
    return State(state.number + 1, x, start, clean, state.last)


def _weighted_sum(weights: Float[Array, "k"], *latents: Latents) -> Latents:
    return sum((weights[n] * x for n, x in enumerate(latents[1:], 1)), weights[0] * latents[0])


# --- Weights ---------------------------------------------------------------------------------------------------------


def _table(told: np.ndarray, levels: Levels, share: np.ndarray, correct: np.ndarray) -> Steps:
    """Return the table of steps that go straight to a mixture of the estimates.

    Args:
        share: weight of the previous estimate in the mixture; 0 gives Euler steps.
    """
    ratio = np.float64(levels[1:]) / np.float64(levels[:-1])
    advance = np.stack([ratio, (1 - ratio) * (1 - share), (1 - ratio) * share], axis=1)
    return Steps(levels[:-1], told.astype(np.float32), correct.astype(np.float32), advance.astype(np.float32))


def _log_snr(levels: Levels) -> np.ndarray:
    """Return half the logarithm of the signal-to-noise ratio of all levels but the last, which is 0."""
    sigma = np.float64(levels[:-1])
    return np.log((1 - sigma) / sigma)


def _share_of_last(levels: Levels) -> np.ndarray:
    """Return the weight of the previous estimate for steps of order 2; the first and the last step have order 1."""
    share, gaps = np.zeros(len(levels) - 1), np.diff(_log_snr(levels))
    share[1:-1] = -0.5 * gaps[1:] / gaps[:-1]
    return share


def _no_correction(steps: int) -> np.ndarray:
    return np.tile([1.0, 0.0, 0.0, 0.0, 0.0], (steps, 1))


def _correction(levels: Levels) -> np.ndarray:
    """Return the weights of UniC, which takes step k - 1 again once the estimate at its end is known."""
    correct, gaps = _no_correction(len(levels) - 1), np.diff(_log_snr(levels))
    for k in range(1, len(correct)):
        ratio = float(levels[k]) / float(levels[k - 1])
        of_before, of_clean = (0.0, 0.5) if k == 1 else _unic_weights(gaps[k - 1], gaps[k - 2])
        mixture = np.array([0, 0, of_clean, 1 - of_clean - of_before, of_before])
        correct[k] = (1 - ratio) * mixture
        correct[k, 1] = ratio
    return correct


def _unic_weights(gap: float, gap_before: float) -> tuple[float, float]:
    """Return the weights of the estimates `before` and `clean` in a corrected step of order 2.

    Args:
        gap: by how much log((1 - sigma) / sigma) grows in the step.
        gap_before: the same for the step before.
    """
    distance = -gap_before / gap
    phi1 = np.expm1(-gap)
    phi2 = phi1 / -gap - 1
    phi3 = phi2 / -gap - 1 / 2
    of_before, of_clean = np.linalg.solve([[1, 1], [distance, 1]], [phi2 / phi1, 2 * phi3 / phi1])
    return of_before / distance, of_clean
