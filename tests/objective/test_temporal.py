"""The TFM path and its loss, on golden data of the official implementation and against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tfm_clips import BATCH, CASES, DEGENERATE, SIGMA, clips, degenerate, distance, golden, loss, path

from tfm_jax.objective import temporal_path
from tfm_jax.objective.temporal import NEWTON_STEPS, per_frame, system, unit

LEVEL = SIGMA[:, None, None, None, None]


@jax.jit
def euler_walk(clean, noise, steps):
    """The official integrator on one clip: `steps` steps of 0.002 from the noise. Returns the end and its velocity."""
    direction = unit(clean - noise)

    def speed(x):
        matrix, change = system(clean, noise, x, 4.0)
        return per_frame(jnp.linalg.solve(matrix, change))

    x = jax.lax.fori_loop(0, steps, lambda _, x: x + 0.002 * (speed(x) * direction), noise)
    return x, -speed(x) * direction


def phi(clean, x, rho):
    """[b, f] in float64, straight from its definition."""
    clean, x = (np.asarray(a, np.float64).reshape(*a.shape[:2], -1) for a in (clean, x))
    gap = np.linalg.norm(np.diff(x, axis=1), axis=-1)
    neighbours = np.pad(gap, ((0, 0), (1, 0))) + np.pad(gap, ((0, 0), (0, 1)))
    return rho * np.linalg.norm(x - clean, axis=-1) + neighbours


# --- Golden data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_path_is_the_exact_one(case):
    g = golden(case)
    actual = path(g["clean"], g["noise"], g["sigma"])
    assert distance(actual.x_t, g["exact_x_t"]) < 1e-5
    assert distance(actual.velocity, g["exact_target"]) < 1e-5
    np.testing.assert_allclose(actual.remaining[0], g["exact_remaining"], rtol=1e-5)
    np.testing.assert_allclose(actual.speed[0], g["exact_speed"], rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_euler_walk_with_our_system_is_the_official_path(case):
    g = golden(case)
    levels = np.arange(g["sigma"][0].astype(np.float64), 1, 0.002)[::-1]
    x_t, velocity = euler_walk(g["clean"][0], g["noise"][0], len(levels) - 1)
    assert distance(x_t, g["euler_x_t"][0]) < 1e-5
    assert distance(velocity, g["euler_target"][0]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_the_official_ones(case):
    g = golden(case)
    at = g["prediction"], g["clean"], g["noise"], g["euler_x_t"]
    direction, residual, gradients = loss(*at)
    np.testing.assert_allclose(direction, g["direction_loss"], rtol=1e-5)
    np.testing.assert_allclose(residual, g["residual_loss"], rtol=1e-5)
    assert distance(gradients[0], g["loss_grad"]) < 1e-5


# --- The path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drift", "independent"])
@pytest.mark.parametrize(("count", "rho"), [(2, 4.0), (6, 4.0), (6, 9.0)])
def test_every_phi_is_linear_in_sigma(count, rho, kind):
    clean, noise = clips(count, count, kind)
    level = np.asarray(SIGMA, np.float64)[:, None]
    expected = level * phi(clean, noise, rho) + (1 - level) * phi(clean, clean, rho)
    actual = path(clean, noise, SIGMA, rho)
    np.testing.assert_allclose(phi(clean, actual.x_t, rho), expected, rtol=2e-6)
    length = np.linalg.norm(np.reshape(actual.x_t - clean, (BATCH, count, -1)), axis=-1)
    np.testing.assert_allclose(actual.remaining, length, rtol=1e-4)  # of a difference of float32 arrays


def test_velocity_is_the_derivative_of_the_path():
    clean, noise = clips(0, 6)

    @jax.jit
    def path_and_slope(sigma):
        return jax.jvp(lambda s: temporal_path(clean, noise, s), (sigma,), (jnp.ones_like(sigma),))

    actual, slope = path_and_slope(SIGMA)
    assert distance(actual.velocity, slope.x_t) < 1e-5
    assert distance(actual.speed, slope.remaining) < 1e-5


def test_one_frame_is_flow_matching():
    clean, noise = clips(1, 1)
    actual = path(clean, noise, SIGMA)
    assert distance(actual.x_t, (1 - LEVEL) * clean + LEVEL * noise) < 1e-6
    assert distance(actual.velocity, noise - clean) < 1e-6


def test_strong_pull_of_the_clean_frame_is_flow_matching():
    clean, noise = clips(2, 6)
    straight = (1 - LEVEL) * clean + LEVEL * noise
    errors = []
    for rho in (4.0, 400.0, 4e4):
        actual = path(clean, noise, SIGMA, rho)
        errors.append([distance(actual.x_t, straight), distance(actual.velocity, noise - clean)])
    errors = np.array(errors)
    assert np.all(errors[0] > 5e-3)  # another path where the pulls are alike
    assert np.all(errors[1] < 0.02 * errors[0])
    assert np.all(errors[2] < 0.02 * errors[1])


def test_a_batch_is_its_videos_one_by_one():
    clean, noise = clips(3, 6)
    clean = clean * jnp.asarray([1.0, 10.0, 0.1, 3.0, 0.0], jnp.float32)[:, None, None, None, None]
    prediction, _ = clips(4, 6)
    together = path(clean, noise, SIGMA)
    direction, residual, gradients = loss(prediction, clean, noise, together.x_t)
    for i in range(BATCH):
        one = slice(i, i + 1)
        alone = path(clean[one], noise[one], SIGMA[one])
        for a, b in zip(together, alone, strict=True):
            assert distance(a[one], b) < 1e-6
        terms = loss(prediction[one], clean[one], noise[one], alone.x_t)
        np.testing.assert_allclose([direction[i], residual[i]], [terms[0][0], terms[1][0]], rtol=1e-5)
        assert distance(gradients[0][one], terms[2][0]) < 1e-5


def test_newton_has_steps_in_reserve(monkeypatch):
    clean, noise = clips(5, 6, "independent")
    usual = path(clean, noise, SIGMA).remaining
    monkeypatch.setattr("tfm_jax.objective.temporal.NEWTON_STEPS", NEWTON_STEPS - 2)
    assert distance(jax.jit(temporal_path)(clean, noise, SIGMA).remaining, usual) < 1e-6


def test_bfloat16_inputs_are_computed_in_float32():
    low = [a.astype(jnp.bfloat16) for a in (*clips(6, 6), SIGMA)]
    high = [a.astype(jnp.float32) for a in low]
    expected = path(*high)
    for a, b in zip(path(*low), expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
    low = [a.astype(jnp.bfloat16) for a in (clips(7, 6)[0], *low[:2], expected.x_t)]
    *terms, gradients = loss(*low)
    *expected, expected_gradients = loss(*(a.astype(jnp.float32) for a in low))
    for a, b in zip(terms, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
    assert gradients[0].dtype == jnp.bfloat16
    assert distance(gradients[0], expected_gradients[0]) < 4e-3


# --- Degenerate clips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_clips_stay_finite(kind, count):
    clean, noise = degenerate(kind, count)
    sigma = jnp.asarray([1.0, 0.995, 0.5, 0.005, 0.0], jnp.float32)
    actual = path(clean, noise, sigma)
    assert all(np.isfinite(field).all() for field in actual)
    np.testing.assert_allclose(actual.x_t[0], noise[0], atol=1e-5)
    np.testing.assert_array_equal(actual.x_t[-1], clean[-1])
    one_frame_zero = actual.velocity.at[:, 0].set(0.0)
    for prediction in (actual.velocity, jnp.zeros_like(clean), one_frame_zero, clips(8, count)[0]):
        direction, residual, gradients = loss(prediction, clean, noise, actual.x_t)
        assert all(np.isfinite(array).all() for array in (direction, residual, *gradients))


@pytest.mark.parametrize("kind", ["identical frames", "identical noise"])
def test_phi_is_linear_for_identical_neighbours_too(kind):
    clean, noise = degenerate(kind, 6)
    sigma = jnp.asarray([1.0, 0.999, 0.5, 0.005, 0.0], jnp.float32)
    level = np.asarray(sigma, np.float64)[:, None]
    expected = level * phi(clean, noise, 4.0) + (1 - level) * phi(clean, clean, 4.0)
    np.testing.assert_allclose(phi(clean, path(clean, noise, sigma).x_t, 4.0), expected, rtol=1e-5, atol=1e-5)


# --- The loss --------------------------------------------------------------------------------------------------------


def test_the_true_velocity_has_no_loss_and_each_term_sees_its_half():
    clean, noise = clips(9, 6)
    x_t, velocity, _, _ = path(clean, noise, SIGMA)
    for scale, direction, residual in ((1.0, 0, 0), (1.5, 0, 0.5), (-1.0, 2, 0)):
        terms = loss(scale * velocity, clean, noise, x_t)
        np.testing.assert_allclose(terms[0], direction, atol=1e-5)
        np.testing.assert_allclose(terms[1], residual, atol=2e-5)


def test_only_the_prediction_is_differentiated():
    clean, noise = clips(10, 6)
    gradients = loss(clips(11, 6)[0], clean, noise, path(clean, noise, SIGMA).x_t)[2]
    assert [bool(np.any(g)) for g in gradients] == [True, False, False, False]


def test_a_frame_predicted_as_zero_gets_no_gradient():
    clean, noise = clips(12, 6)
    x_t, velocity, _, _ = path(clean, noise, SIGMA)
    gradient = loss((velocity + clean).at[:, 1].set(0.0), clean, noise, x_t)[2][0]
    assert [bool(np.any(gradient[:, i])) for i in range(6)] == [True, False, True, True, True, True]


def test_a_prediction_that_is_not_a_number_is_not_hidden():
    clean, noise = (array[:1] for array in clips(18, 6))
    x_t = path(clean, noise, SIGMA[2:3]).x_t
    prediction = jnp.ones_like(clean).at[0, 1, 0, 0, 0].set(jnp.nan)
    direction, residual, _ = loss(prediction, clean, noise, x_t)
    assert np.isnan([direction, residual]).all()
