"""The TFM path and loss beside the official algorithm, which walks along the path in Euler steps over whole latents.

Both compute x_t, the loss of a prediction at x_t and the gradient of the loss. The official algorithm takes a step for
each 0.002 between the noise level and 1, so its time depends on the level: both are averaged over the levels that
training draws.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.sizes import Sizes
from benchmarks.timing import Row, race
from tfm_jax.objective import temporal_loss, temporal_path
from tfm_jax.objective.schedule import LEVELS, sigmas

RHO, STEP, EPS = 4.0, 0.002, 1e-12
NUM_LEVELS = 4
"""The uniform law is cut into so many equal parts, and the level in the middle of each is measured."""


def measure(sizes: Sizes) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(sizes.objective, np.float32) for _ in range(3)]
    levels = sigmas()[(2 * np.arange(NUM_LEVELS) + 1) * LEVELS // (2 * NUM_LEVELS)]
    clean, noise, prediction = (jnp.asarray(x)[None] for x in arrays)
    theirs = [peers.tensor(x.reshape(len(x), -1), sizes, torch.float32) for x in arrays]

    def run_ours() -> object:
        return jax.block_until_ready([_ours(prediction, clean, noise, jnp.asarray([level])) for level in levels])

    def run_theirs() -> object:
        return [official(theirs[2], theirs[0], theirs[1], float(level)) for level in levels]

    frames, height, width, channels = sizes.objective
    case = f"x_t, loss and gradient, {frames} frames of {height} x {width} x {channels}, mean over levels"
    peer = "the official algorithm in PyTorch"
    row = race("objective", case, run_ours, peer, peers.program(sizes, run_theirs), sizes.budget)
    yield row._replace(seconds=row.seconds / NUM_LEVELS, peer_seconds=row.peer_seconds / NUM_LEVELS)


@jax.jit
def _ours(prediction: jax.Array, clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_t = temporal_path(clean, noise, sigma, RHO).x_t

    def loss(prediction: jax.Array) -> jax.Array:
        direction, residual = temporal_loss(prediction, clean, noise, x_t, RHO)
        return jnp.sum(direction + residual)

    return jax.value_and_grad(loss)(prediction)


# --- The official algorithm ------------------------------------------------------------------------------------------


def official(prediction: Tensor, clean: Tensor, noise: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, the loss and its gradient. All tensors have a row for each frame of one video."""
    x_t, target = official_path(clean, noise, sigma)
    prediction = prediction.detach().requires_grad_()
    loss = official_loss(prediction, clean, noise, x_t, target)
    return x_t, loss.detach(), torch.autograd.grad(loss, prediction)[0]


def official_path(clean: Tensor, noise: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Walk from the noise to the level `sigma`. Return the end and the velocity there, with the sign of the network."""
    direction = _unit(clean - noise)
    change = _phi(clean, clean) - _phi(noise, clean)
    x = noise
    for _ in np.arange(sigma, 1, STEP)[1:]:
        x = x + STEP * _speed(x, clean, direction, change)[:, None] * direction
    return x, -_speed(x, clean, direction, change)[:, None] * direction


def official_loss(prediction: Tensor, clean: Tensor, noise: Tensor, x_t: Tensor, target: Tensor) -> Tensor:
    """Return the direction and the residual of a prediction, averaged over the frames and added up."""
    matrix = _matrix(x_t, _unit(clean - noise))
    change = _phi(clean, clean) - _phi(noise, clean)
    direction = 1 - torch.nn.functional.cosine_similarity(prediction, target, dim=1)
    residual = ((matrix @ prediction.norm(dim=1)).abs() / (change.abs() + 1e-6) - 1).abs()
    return direction.mean() + residual.mean()


def _speed(x: Tensor, clean: Tensor, direction: Tensor, change: Tensor) -> Tensor:
    return torch.linalg.solve(_matrix(x, direction), change)


def _matrix(x: Tensor, direction: Tensor) -> Tensor:
    """Return M at x, frame by frame as in the release."""
    count = len(x)
    matrix = torch.zeros(count, count, device=x.device)
    for i in range(count):
        matrix[i, i] = -RHO
        for j in (i - 1, i + 1):
            if 0 <= j < count:
                toward = _unit(x[i] - x[j])
                matrix[i, i] += toward @ direction[i]
                matrix[i, j] = -toward @ direction[j]
    return matrix


def _phi(x: Tensor, clean: Tensor) -> Tensor:
    total = RHO * (x - clean).norm(dim=1)
    gap = (x[1:] - x[:-1]).norm(dim=1)
    total[:-1] += gap
    total[1:] += gap
    return total


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)
