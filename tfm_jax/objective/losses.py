"""From a velocity function and clean latents to the training loss.

To add an objective: write a function like `temporal_flow_matching`, name it in OBJECTIVES and in
`ObjectiveConfig.kind`. To add a term to one: compute it there, give it a weight in the configuration and return it
among the terms.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tfm_jax.arrays import Latents, PerVideo, Scalar, Text
from tfm_jax.config import ObjectiveConfig
from tfm_jax.objective import schedule
from tfm_jax.objective.temporal import temporal_loss, temporal_path

Velocity = Callable[[Latents, PerVideo, Text], Latents]
"""The network: (latents, timestep 0..1000, text) -> velocity, which has the sign of noise - clean."""

Terms = dict[str, PerVideo]


def objective_loss(
    velocity: Velocity, clean: Latents, text: Text, key: jax.Array, config: ObjectiveConfig
) -> tuple[Scalar, dict[str, Scalar]]:
    """Loss of a batch at noise and noise levels drawn from `key`.

    Every video has its own noise level, and its loss is scaled by the weight of that level; the result is the mean
    over the videos.

    Returns:
        The loss, and its terms as plain means over the videos, without the weights: direction and residual for tfm,
        mse for fm. All float32.
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
    predict: Callable[[Latents], Latents], clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Loss of each video on the TFM path: direction + beta residual."""
    x_t = temporal_path(clean, noise, sigma, config.rho).x_t
    direction, residual = temporal_loss(predict(x_t), clean, noise, x_t, config.rho)
    return direction + config.beta * residual, {"direction": direction, "residual": residual}


def flow_matching(
    predict: Callable[[Latents], Latents], clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Loss of each video on the straight path: mean squared error against noise - clean."""
    level = sigma[:, None, None, None, None]
    error = predict((1 - level) * clean + level * noise).astype(jnp.float32) - (noise - clean)
    mse = jnp.mean(jnp.square(error), axis=(1, 2, 3, 4))
    return mse, {"mse": mse}


OBJECTIVES = {"tfm": temporal_flow_matching, "fm": flow_matching}
