"""From a velocity function and clean latents to the training loss.

To add an objective: write a function like `temporal_flow_matching`, name it in OBJECTIVES and in
`ObjectiveConfig.kind`. To add a term to one: compute it there, give it a weight in the configuration and return it
among the terms.

TFM differs from flow matching in two things, the path and the loss. Beside the two stand the controls that change one
of them at a time: the straight path with TFM's loss, TFM's path with the mean squared error, and the straight path
with nothing of TFM's but the mean of its clocks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tfm_jax.arrays import Latents, PerVideo, Scalar, Text
from tfm_jax.config import ObjectiveConfig
from tfm_jax.objective import schedule
from tfm_jax.objective.temporal import safe_divide, temporal_loss, temporal_path

Velocity = Callable[[Latents, PerVideo, Text], Latents]
"""The network: (latents, timestep 0..1000, text) -> velocity, which has the sign of noise - clean."""

Predict = Callable[[Latents], Latents]
"""The network at one noise level of each video: x_t -> velocity."""

Terms = dict[str, PerVideo]

STRAIGHT = 1e6
"""A pull of the clean frame so strong that TFM is flow matching, as far as float32 can tell."""


def objective_loss(
    velocity: Velocity, clean: Latents, text: Text, key: jax.Array, config: ObjectiveConfig
) -> tuple[Scalar, dict[str, Scalar]]:
    """Loss of a batch at noise and noise levels drawn from `key`.

    Every video has its own noise level, and its loss is scaled by the weight of that level; the result is the mean
    over the videos.

    Returns:
        The loss, and its terms as plain means over the videos, without the weights: direction and residual for tfm
        and fm_direction, mse for the others. All float32.
    """
    noise_key, level_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, clean.shape, jnp.float32)
    index = schedule.sample_index(level_key, clean.shape[0], config.low, config.high)
    sigma = jnp.asarray(schedule.sigmas(config.shift))[index]
    weight = jnp.asarray(schedule.weights(config.shift))[index]

    def predict(x_t: Latents) -> Latents:
        return velocity(x_t, schedule.timestep(sigma), text)

    loss, terms = OBJECTIVES[config.kind](predict, clean.astype(jnp.float32), noise, sigma, config)
    return jnp.mean(weight * loss), {name: jnp.mean(term) for name, term in terms.items()}


def temporal_flow_matching(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Loss of each video on the TFM path: direction + beta residual."""
    x_t = temporal_path(clean, noise, sigma, config.rho).x_t
    return _direction_and_residual(predict(x_t), clean, noise, x_t, config.rho, config.beta)


def flow_matching(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Loss of each video on the straight path: mean squared error against noise - clean."""
    return _squared_error(predict(_between(clean, noise, sigma)), noise - clean)


def directional_flow_matching(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Control: the straight path with TFM's loss, which there is 1 - cos(v_i, u_i) + beta | |v_i| / |u_i| - 1 |."""
    x_t = _between(clean, noise, sigma)
    return _direction_and_residual(predict(x_t), clean, noise, x_t, STRAIGHT, config.beta)


def temporal_regression(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Control: the TFM path with flow matching's loss, the mean squared error against the velocity there."""
    path = temporal_path(clean, noise, sigma, config.rho)
    return _squared_error(predict(path.x_t), path.velocity)


def warped_flow_matching(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Control: flow matching on the mean of TFM's clocks, so that frames keep no distances but time is bent alike.

    On the TFM path frame i has the share q_i / D_i of its way left at sigma, and loses it at the rate h_i / D_i. Here
    every frame has the mean share of its video, and moves at the mean rate, which is its derivative.
    """
    path = temporal_path(clean, noise, sigma, config.rho)
    distance = jnp.sqrt(jnp.sum(jnp.square(noise - clean), axis=(2, 3, 4)))
    remaining, rate = (jnp.mean(safe_divide(x, distance), axis=1) for x in (path.remaining, path.speed))
    return _squared_error(predict(_between(clean, noise, remaining)), _per_video(rate) * (noise - clean))


OBJECTIVES = {
    "tfm": temporal_flow_matching,
    "fm": flow_matching,
    "fm_direction": directional_flow_matching,
    "tfm_mse": temporal_regression,
    "fm_warp": warped_flow_matching,
}


def _between(clean: Latents, noise: Latents, remaining: PerVideo) -> Latents:
    """The point on the straight path with this share of the way to clean left."""
    return (1 - _per_video(remaining)) * clean + _per_video(remaining) * noise


def _squared_error(prediction: Latents, velocity: Latents) -> tuple[PerVideo, Terms]:
    mse = jnp.mean(jnp.square(prediction.astype(jnp.float32) - velocity), axis=(1, 2, 3, 4))
    return mse, {"mse": mse}


def _direction_and_residual(
    prediction: Latents, clean: Latents, noise: Latents, x_t: Latents, rho: float, beta: float
) -> tuple[PerVideo, Terms]:
    direction, residual = temporal_loss(prediction, clean, noise, x_t, rho)
    return direction + beta * residual, {"direction": direction, "residual": residual}


def _per_video(x: PerVideo) -> Float[Array, "b 1 1 1 1"]:
    return x[:, None, None, None, None]
