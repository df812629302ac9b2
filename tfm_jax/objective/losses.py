"""The training loss of a velocity function on clean latents.

To add an objective, write a function like `temporal_flow_matching`, add it to OBJECTIVES, and add its name to
`ObjectiveConfig.kind`. To add a term to an objective, compute the term in the function of that objective, give it a
weight in the configuration, and return it among the terms.

TFM differs from plain flow matching in its path and in its loss. The controls change one thing at a time:
`fm_direction` is the straight path with TFM's loss, `tfm_mse` is TFM's path with the mean squared error, and `fm_warp`
is plain flow matching with TFM's average timing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tfm_jax.arrays import Latents, PerVideo, Scalar, Text
from tfm_jax.config import ObjectiveConfig
from tfm_jax.objective import schedule
from tfm_jax.objective.temporal import safe_divide, temporal_loss, temporal_path

Velocity = Callable[[Latents, PerVideo, Text], Latents]
"""The network: (latents, timestep in 0..1000, text) -> velocity, with the sign of noise - clean."""

Predict = Callable[[Latents], Latents]
"""The network for a given timestep and text: x_t -> velocity."""

Terms = dict[str, PerVideo]
"""The terms of the loss by name, for each video and without weights."""

STRAIGHT_PATH_RHO = 1e6
"""A rho so large that the TFM path equals the straight path of flow matching to float32 accuracy."""


class Draws(NamedTuple):
    """What is drawn at random for each video of a batch."""

    noise: Latents
    sigma: PerVideo
    """Noise level."""
    weight: PerVideo
    """Weight of the loss at that noise level."""


def draw(key: jax.Array, shape: tuple[int, ...], config: ObjectiveConfig) -> Draws:
    """Draw noise and a noise level for each video of a batch of this shape, in float32."""
    noise_key, level_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, shape, jnp.float32)
    index = schedule.sample_index(level_key, shape[0], config)
    sigma = jnp.asarray(schedule.sigmas(config.shift))[index]
    weight = jnp.asarray(schedule.WEIGHTS[config.weight](config.shift))[index]
    return Draws(noise, sigma, weight)


def objective_loss(
    velocity: Velocity, clean: Latents, text: Text, draws: Draws, config: ObjectiveConfig
) -> tuple[Scalar, dict[str, Scalar], PerVideo]:
    """Return the loss of a batch, for the noise and the noise levels in `draws`.

    Each video has its own noise level, and its loss is scaled by the weight of that level. The loss of the batch is
    the mean over the videos.

    Returns:
        The loss; its terms averaged over the videos without any weights: direction and residual for tfm and
        fm_direction, mse for the other objectives; and the loss of each video, without the weight of its noise level.
        All are float32.
    """
    noise, sigma, weight = draws

    def predict(x_t: Latents) -> Latents:
        return velocity(x_t, schedule.timestep(sigma), text)

    loss, terms = OBJECTIVES[config.kind](predict, clean.astype(jnp.float32), noise, sigma, config)
    return jnp.mean(weight * loss), {name: jnp.mean(term) for name, term in terms.items()}, loss


def temporal_flow_matching(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """TFM: the loss direction + beta * residual, on the TFM path."""
    x_t = temporal_path(clean, noise, sigma, config.rho).x_t
    return _direction_and_residual(predict(x_t), clean, noise, x_t, config.rho, config.beta)


def flow_matching(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Plain flow matching: the mean squared error against noise - clean, on the straight path."""
    return _squared_error(predict(_interpolate(clean, noise, sigma)), noise - clean)


def directional_flow_matching(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Control: TFM's loss on the straight path, that is, 1 - cos(v_i, u_i) + beta * | |v_i| / |u_i| - 1 | per frame."""
    x_t = _interpolate(clean, noise, sigma)
    return _direction_and_residual(predict(x_t), clean, noise, x_t, STRAIGHT_PATH_RHO, config.beta)


def temporal_regression(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Control: the mean squared error against the velocity of the TFM path, on that path."""
    path = temporal_path(clean, noise, sigma, config.rho)
    return _squared_error(predict(path.x_t), path.velocity)


def warped_flow_matching(
    predict: Predict, clean: Latents, noise: Latents, sigma: PerVideo, config: ObjectiveConfig
) -> tuple[PerVideo, Terms]:
    """Control: flow matching with TFM's average timing, but without its coupling of neighbouring frames.

    On the TFM path at noise level sigma, frame i still has the fraction q_i / D_i of its way to go; the derivative of
    this fraction is h_i / D_i. Here, all frames of a video use the mean fraction and the mean derivative.
    """
    path = temporal_path(clean, noise, sigma, config.rho)
    distance = jnp.sqrt(jnp.sum(jnp.square(noise - clean), axis=(2, 3, 4)))
    fraction, rate = (jnp.mean(safe_divide(x, distance), axis=1) for x in (path.remaining, path.speed))
    return _squared_error(predict(_interpolate(clean, noise, fraction)), _per_video(rate) * (noise - clean))


OBJECTIVES = {
    "tfm": temporal_flow_matching,
    "fm": flow_matching,
    "fm_direction": directional_flow_matching,
    "tfm_mse": temporal_regression,
    "fm_warp": warped_flow_matching,
}


def _interpolate(clean: Latents, noise: Latents, fraction: PerVideo) -> Latents:
    """Return the point on the straight path with this fraction of noise."""
    return (1 - _per_video(fraction)) * clean + _per_video(fraction) * noise


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
