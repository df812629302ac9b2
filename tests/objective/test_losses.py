"""The training objectives: their loss at noise and noise levels drawn from a key, and the controls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tfm_clips import BATCH, DEGENERATE, SIGMA, clips, degenerate, distance, loss, path

from tfm_jax.config import ObjectiveConfig
from tfm_jax.objective import draw, objective_loss, schedule, temporal_path
from tfm_jax.objective.losses import OBJECTIVES
from tfm_jax.objective.temporal import per_frame

# --- Training objective ----------------------------------------------------------------------------------------------


def run(velocity, clean, seed=0, **config):
    """objective_loss, and the latents and timesteps that it passed to the network, all under jit."""

    @jax.jit
    def step(clean, text, key):
        passed = []

        def network(*arguments):
            passed.append(arguments)
            return velocity(*arguments[:2])

        objective = ObjectiveConfig(**config)
        total, terms, _ = objective_loss(network, clean, text, draw(key, clean.shape, objective), objective)
        ((latents, timestep, given_text),) = passed
        return total, terms, latents, timestep, given_text

    text = jnp.arange(2.0 * len(clean), dtype=jnp.float32).reshape(len(clean), 1, 2)
    *result, given_text = step(clean, text, jax.random.key(seed))
    np.testing.assert_array_equal(given_text, text)
    return result


def weight_at(timestep):
    index = np.abs(schedule.sigmas()[:, None] * 1000 - np.asarray(timestep)).argmin(axis=0)
    np.testing.assert_allclose(schedule.sigmas()[index] * 1000, timestep, rtol=1e-5)
    return schedule.bell_weights()[index].astype(np.float64)


def test_flow_matching_is_mean_squared_error_on_the_straight_path():
    clean, _ = clips(13, 6)
    total, terms, latents, timestep = run(lambda x, t: 0.5 * x, clean, kind="fm")
    assert set(terms) == {"mse"}
    level = np.asarray(timestep, np.float64)[:, None, None, None, None] / 1000
    difference = (latents - clean) / level  # x_t = clean + sigma (noise - clean)
    mse = np.mean((0.5 * latents - difference) ** 2, axis=(1, 2, 3, 4))
    assert np.ptp(weight_at(timestep)) > 0.1
    np.testing.assert_allclose(terms["mse"], mse.mean(), rtol=1e-4)
    np.testing.assert_allclose(total, np.mean(weight_at(timestep) * mse), rtol=1e-4)
    noise = difference + clean
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert abs(np.corrcoef(np.reshape(noise, (BATCH, -1))) - np.eye(BATCH)).max() < 0.2


def test_temporal_flow_matching_uses_the_temporal_path_and_loss():
    clean, _ = clips(14, 6)
    total, terms, latents, timestep = run(lambda x, t: x - clean, clean, beta=0.5)
    assert set(terms) == {"direction", "residual"}
    noise = jax.random.normal(jax.random.split(jax.random.key(0))[0], clean.shape)
    x_t = path(clean, noise, timestep / 1000).x_t
    np.testing.assert_allclose(latents, x_t, atol=1e-5)
    direction, residual, _ = loss(x_t - clean, clean, noise, x_t)
    np.testing.assert_allclose(terms["direction"], 0, atol=1e-5)  # every frame in its true direction ...
    assert terms["residual"] > 0.01  # ... at a wrong speed
    np.testing.assert_allclose(terms["residual"], np.mean(residual), rtol=1e-4)
    np.testing.assert_allclose(total, np.mean(weight_at(timestep) * (direction + 0.5 * residual)), rtol=1e-4)


@pytest.mark.parametrize("kind", ["tfm", "fm"])
def test_weights_are_not_normalised_over_the_batch(kind):
    clean, _ = clips(15, 6)
    total, terms, _, timestep = run(lambda x, t: jnp.zeros_like(x), clean, kind=kind, low=0.5, high=0.501)
    np.testing.assert_allclose(timestep, 1000 * schedule.sigmas()[500], rtol=1e-6)
    if kind == "tfm":
        assert (terms["direction"], terms["residual"]) == (1, 1)
    np.testing.assert_allclose(total, schedule.bell_weights()[500] * sum(terms.values()), rtol=1e-5)


def test_objective_is_a_function_of_the_key():
    clean, _ = clips(16, 6)
    text = jnp.zeros((BATCH, 2, 3), jnp.float32)

    @jax.jit
    def total(key):
        objective = ObjectiveConfig(kind="fm")
        draws = draw(key, clean.shape, objective)
        return objective_loss(lambda x, t, _: 0.5 * x, clean, text, draws, objective)[0]

    first, again, other = (total(jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", ["tfm", "fm"])
def test_objective_differentiates_a_bfloat16_network(kind):
    clean, _ = clips(17, 6)
    text = jnp.zeros((BATCH, 2, 3), jnp.float32)

    def total(scale):
        network = lambda latents, timestep, text: latents.astype(jnp.bfloat16) * scale  # noqa: E731
        objective = ObjectiveConfig(kind=kind)
        draws = draw(jax.random.key(0), clean.shape, objective)
        return objective_loss(network, clean, text, draws, objective)[0]

    value, slope = jax.jit(jax.value_and_grad(total))(jnp.asarray(0.5, jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(slope)
    assert slope != 0


# --- The controls ----------------------------------------------------------------------------------------------------

CONTROLS = ("fm_direction", "tfm_mse", "fm_warp")
AFFINE = (lambda x, t: 0.7 * x + 0.1, lambda x, t: jnp.flip(x, axis=2))


def noise_of(clean, seed=0):
    """The noise that is drawn for seed."""
    return jax.random.normal(jax.random.split(jax.random.key(seed))[0], clean.shape)


@functools.cache
def limiting_run(velocity, kind):
    """The run that several controls approach."""
    return run(velocity, clips(20, 6)[0], kind=kind)


@pytest.mark.parametrize("velocity", AFFINE)
@pytest.mark.parametrize(("control", "limit"), [("tfm_mse", "fm"), ("fm_warp", "fm"), ("tfm", "fm_direction")])
def test_a_strong_pull_of_the_clean_frame_leaves_only_the_loss(control, limit, velocity):
    clean, _ = clips(20, 6)
    expected = limiting_run(velocity, limit)
    errors = []
    for rho in (4.0, 4e4):
        total, terms, latents, _ = run(velocity, clean, kind=control, rho=rho)
        assert set(terms) == set(expected[1])
        errors.append((abs(total / expected[0] - 1), distance(latents, expected[2])))
    (loss_apart, path_apart), (loss_near, path_near) = errors
    assert loss_apart > 5e-3
    assert path_apart > 5e-3
    assert loss_near < 1e-3 * max(1, loss_apart)
    assert path_near < 1e-5


@pytest.mark.parametrize("control", CONTROLS)
def test_one_frame_leaves_only_the_loss(control):
    clean, _ = clips(21, 1)
    expected = run(AFFINE[0], clean, kind="tfm" if control == "fm_direction" else "fm")
    total, terms, latents, _ = run(AFFINE[0], clean, kind=control)
    np.testing.assert_allclose(total, expected[0], rtol=1e-5)
    assert distance(latents, expected[2]) < 1e-6
    assert set(terms) == set(expected[1])


def test_directional_flow_matching_is_cosine_and_length_on_the_straight_path():
    clean, _ = clips(22, 6)
    total, terms, latents, timestep = run(AFFINE[1], clean, kind="fm_direction", beta=0.5)
    straight = run(AFFINE[1], clean, kind="fm")[2]
    np.testing.assert_array_equal(latents, straight)
    wanted = np.asarray(noise_of(clean) - clean, np.float64).reshape(BATCH, 6, -1)
    given = np.flip(np.asarray(latents, np.float64), axis=2).reshape(BATCH, 6, -1)
    lengths = np.linalg.norm(given, axis=-1), np.linalg.norm(wanted, axis=-1)
    direction = np.mean(1 - np.sum(given * wanted, axis=-1) / lengths[0] / lengths[1], axis=1)
    residual = np.mean(abs(lengths[0] / lengths[1] - 1), axis=1)
    np.testing.assert_allclose(terms["direction"], direction.mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["residual"], residual.mean(), rtol=1e-4)
    np.testing.assert_allclose(total, np.mean(weight_at(timestep) * (direction + 0.5 * residual)), rtol=1e-4)


def test_temporal_regression_is_mean_squared_error_on_the_temporal_path():
    clean, _ = clips(23, 6)
    total, terms, latents, timestep = run(AFFINE[0], clean, kind="tfm_mse")
    x_t, velocity, _, _ = path(clean, noise_of(clean), timestep / 1000)
    np.testing.assert_allclose(latents, x_t, atol=1e-5)
    mse = np.mean((0.7 * x_t + 0.1 - velocity) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(terms["mse"], mse.mean(), rtol=1e-4)
    np.testing.assert_allclose(total, np.mean(weight_at(timestep) * mse), rtol=1e-4)


def test_the_warp_has_the_average_timing_of_the_temporal_path():
    """The mean of q / D remains at its point, and its target is the derivative of that mean."""
    clean, _ = clips(24, 6)
    noise = noise_of(clean)
    back = noise - clean

    def mean_fraction(sigma):
        remaining = temporal_path(clean, noise, sigma).remaining
        return jnp.mean(remaining / jnp.sqrt(jnp.sum(back**2, axis=(2, 3, 4))), axis=1)

    _, _, latents, timestep = run(lambda x, t: x, clean, kind="fm_warp")
    sigma = timestep / 1000
    fraction, rate = jax.jit(lambda s: jax.jvp(mean_fraction, (s,), (jnp.ones_like(s),)))(sigma)
    assert abs(fraction - sigma).max() > 0.01  # flow matching would have sigma
    np.testing.assert_allclose(latents, clean + per_frame(fraction)[..., None] * back, atol=1e-5)
    _, terms, _, _ = run(lambda x, t: per_frame(rate)[..., None] * back, clean, kind="fm_warp")
    np.testing.assert_allclose(terms["mse"], 0, atol=1e-9)


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_train_on_degenerate_clips(control):
    @jax.jit
    @jax.value_and_grad
    def total(scale, clean, noise):
        config = ObjectiveConfig(kind=control)
        return jnp.mean(OBJECTIVES[control](lambda x: scale * x, clean, noise, SIGMA, config)[0])

    for kind in DEGENERATE:
        value, slope = total(jnp.float32(0.5), *degenerate(kind, 3))
        assert np.isfinite(value)
        assert np.isfinite(slope)
