"""The training objective: noise levels, the TFM path and loss, flow matching, and their use in a training step.

golden/tfm_objective.safetensors holds eight clips run through the official implementation (Euler path, loss,
gradient) and the exact path in float64.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from tfm_jax.config import ObjectiveConfig
from tfm_jax.errors import InputError
from tfm_jax.objective import objective_loss, schedule, shift_sigma, temporal_loss, temporal_path
from tfm_jax.objective.losses import OBJECTIVES
from tfm_jax.objective.temporal import NEWTON_STEPS, per_frame, system, unit

GOLDEN = load_file(Path(__file__).parent / "golden" / "tfm_objective.safetensors")
CASES = sorted({name.split("/")[0] for name in GOLDEN})
BATCH, SIZE = 5, (3, 4, 6)  # one size nearly everywhere, so that little has to be compiled
SIGMA = jnp.asarray([0.999, 0.8, 0.5, 0.2, 0.005], jnp.float32)
LEVEL = SIGMA[:, None, None, None, None]

path = jax.jit(temporal_path, static_argnums=3)


@pytest.fixture(autouse=True)
def _strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


@jax.jit
def loss(*at):
    """direction, residual, and the gradients of their sum by prediction, clean, noise and x_t."""

    def total(*at):
        terms = temporal_loss(*at)
        return sum(jnp.sum(term) for term in terms), terms

    (_, terms), gradients = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*at)
    return *terms, gradients


@jax.jit
def euler_walk(clean, noise, steps):
    """The official integrator on one clip: `steps` steps of 0.002 from the noise, then the velocity at the end."""
    direction = unit(clean - noise)

    def speed(x):
        matrix, change = system(clean, noise, x, 4.0)
        return per_frame(jnp.linalg.solve(matrix, change))

    x = jax.lax.fori_loop(0, steps, lambda _, x: x + 0.002 * (speed(x) * direction), noise)
    return x, -speed(x) * direction


def golden(case):
    arrays = {name.split("/")[1]: array for name, array in GOLDEN.items() if name.startswith(case + "/")}
    return {k: rearrange(v, "b c f h w -> b f h w c") if v.ndim == 5 else v for k, v in arrays.items()}


def distance(actual, expected):
    """Relative L2 distance, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def clips(seed, count, kind="drift"):
    """Clean latents and noise of BATCH different videos of `count` frames."""
    draw = np.random.default_rng(seed).normal
    steps = draw(size=(BATCH, count, *SIZE)) * (0.3 if kind == "drift" else 1.0)
    steps[:, 0] = draw(size=(BATCH, *SIZE))
    clean = np.cumsum(steps, axis=1) if kind == "drift" else steps
    return jnp.asarray(clean, jnp.float32), jnp.asarray(draw(size=clean.shape), jnp.float32)


def phi(clean, x, rho):
    """[b, f] in float64, straight from its definition."""
    clean, x = (np.asarray(a, np.float64).reshape(*a.shape[:2], -1) for a in (clean, x))
    gap = np.linalg.norm(np.diff(x, axis=1), axis=-1)
    neighbours = np.pad(gap, ((0, 0), (1, 0))) + np.pad(gap, ((0, 0), (0, 1)))
    return rho * np.linalg.norm(x - clean, axis=-1) + neighbours


# --- Noise levels ----------------------------------------------------------------------------------------------------


def test_grid_falls_from_noise_and_agrees_with_the_sampling_grid():
    sigma = schedule.sigmas(5.0)
    assert sigma.shape == (1000,)
    assert sigma.dtype == np.float32
    assert sigma[0] == 1
    assert np.all(np.diff(sigma) < 0)
    np.testing.assert_allclose(sigma[-1], 5 / 1004, rtol=1e-6)
    np.testing.assert_allclose(shift_sigma(jnp.linspace(1, 0, 1001), 5.0)[:-1], sigma, atol=1e-6)
    np.testing.assert_allclose(schedule.sigmas(1.0), np.linspace(1, 0, 1001)[:-1], rtol=1e-6)


def test_weights_belong_to_the_grid():
    weight, sigma = schedule.weights(5.0), schedule.sigmas(5.0)
    assert weight.dtype == np.float32
    assert weight.min() == 0 == weight[0]
    np.testing.assert_allclose(weight.astype(np.float64).sum(), 1000, rtol=1e-6)
    assert abs(sigma[weight.argmax()] - 0.5) < 0.002
    bell = np.exp(-2 * (sigma.astype(np.float64) - 0.5) ** 2)
    ratio = (bell[700] - bell[0]) / (bell[900] - bell[0])
    np.testing.assert_allclose(weight[700] / weight[900], ratio, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_levels_and_weights_are_the_official_ones(case):
    g = golden(case)
    np.testing.assert_allclose(schedule.sigmas()[g["timestep_index"]], g["sigma"], rtol=1e-6)
    # The official table is float32 throughout: near its zero at pure noise only absolute agreement makes sense.
    np.testing.assert_allclose(schedule.weights()[g["timestep_index"]], g["loss_weight"], rtol=1e-6, atol=1e-6)


def test_indices_are_uniform_over_the_part_of_the_grid():
    index = np.asarray(schedule.sample_index(jax.random.key(0), 20000, 0.25, 0.75))
    assert (index.min(), index.max()) == (250, 749)
    counts = np.histogram(index, bins=10, range=(250, 750))[0]
    assert np.all(np.abs(counts - 2000) < 6 * np.sqrt(2000))
    np.testing.assert_array_equal(schedule.sample_index(jax.random.key(1), 3, 0.5, 0.501), 500)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.5, 0.5001), (0.6, 0.4), (0.0, 1.1), (-0.1, 1.0)])
def test_an_empty_or_impossible_part_of_the_grid_is_refused(low, high):
    with pytest.raises(InputError, match=rf"objective.low={low}, objective.high={high}: expected"):
        schedule.sample_index(jax.random.key(0), 1, low, high)


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


DEGENERATE = (
    "ordinary",
    "identical frames",
    "identical noise",
    "both identical",
    "clean is noise",
    "one clean frame is noise",
    "all zero",
)


def degenerate(kind, count):
    clean, noise = clips(7, count)
    if kind == "identical frames":
        clean = jnp.broadcast_to(clean[:, :1], clean.shape)
    elif kind == "identical noise":
        noise = jnp.broadcast_to(noise[:, :1], noise.shape)
    elif kind == "both identical":
        clean, noise = jnp.broadcast_to(clean[:, :1], clean.shape), jnp.broadcast_to(noise[:, :1], noise.shape)
    elif kind == "clean is noise":
        noise = clean
    elif kind == "one clean frame is noise":
        noise = noise.at[:, 0].set(clean[:, 0])
    elif kind == "all zero":
        clean = noise = jnp.zeros_like(clean)
    return clean, noise


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


# --- Training objective ----------------------------------------------------------------------------------------------


def run(velocity, clean, seed=0, **config):
    """objective_loss, and the latents and timesteps that it passed to the network, all under jit."""

    @jax.jit
    def step(clean, text, key):
        passed = []

        def network(*arguments):
            passed.append(arguments)
            return velocity(*arguments[:2])

        total, terms = objective_loss(network, clean, text, key, ObjectiveConfig(**config))
        ((latents, timestep, given_text),) = passed
        return total, terms, latents, timestep, given_text

    text = jnp.arange(2.0 * len(clean), dtype=jnp.float32).reshape(len(clean), 1, 2)
    *result, given_text = step(clean, text, jax.random.key(seed))
    np.testing.assert_array_equal(given_text, text)
    return result


def weight_at(timestep):
    index = np.abs(schedule.sigmas()[:, None] * 1000 - np.asarray(timestep)).argmin(axis=0)
    np.testing.assert_allclose(schedule.sigmas()[index] * 1000, timestep, rtol=1e-5)
    return schedule.weights()[index].astype(np.float64)


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
    np.testing.assert_allclose(total, schedule.weights()[500] * sum(terms.values()), rtol=1e-5)


def test_objective_is_a_function_of_the_key():
    clean, _ = clips(16, 6)
    text = jnp.zeros((BATCH, 2, 3), jnp.float32)

    @jax.jit
    def total(key):
        return objective_loss(lambda x, t, _: 0.5 * x, clean, text, key, ObjectiveConfig(kind="fm"))[0]

    first, again, other = (total(jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", ["tfm", "fm"])
def test_objective_differentiates_a_bfloat16_network(kind):
    clean, _ = clips(17, 6)
    text = jnp.zeros((BATCH, 2, 3), jnp.float32)

    def total(scale):
        network = lambda latents, timestep, text: latents.astype(jnp.bfloat16) * scale  # noqa: E731
        return objective_loss(network, clean, text, jax.random.key(0), ObjectiveConfig(kind=kind))[0]

    value, slope = jax.jit(jax.value_and_grad(total))(jnp.asarray(0.5, jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(slope)
    assert slope != 0


# --- The controls ----------------------------------------------------------------------------------------------------

CONTROLS = ("fm_direction", "tfm_mse", "fm_warp")
AFFINE = (lambda x, t: 0.7 * x + 0.1, lambda x, t: jnp.flip(x, axis=2))


def noise_of(clean, seed=0):
    """The noise that objective_loss draws for seed."""
    return jax.random.normal(jax.random.split(jax.random.key(seed))[0], clean.shape)


@pytest.mark.parametrize("velocity", AFFINE)
@pytest.mark.parametrize(("control", "limit"), [("tfm_mse", "fm"), ("fm_warp", "fm"), ("tfm", "fm_direction")])
def test_a_strong_pull_of_the_clean_frame_leaves_only_the_loss(control, limit, velocity):
    clean, _ = clips(20, 6)
    expected = run(velocity, clean, kind=limit)
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


def test_the_warp_is_the_mean_of_the_clocks_of_the_temporal_path():
    """Its point has the mean share of q / D left, its target is the derivative of that, and frames keep in step."""
    clean, _ = clips(24, 6)
    noise = noise_of(clean)
    back = noise - clean

    def share(sigma):
        remaining = temporal_path(clean, noise, sigma).remaining
        return jnp.mean(remaining / jnp.sqrt(jnp.sum(back**2, axis=(2, 3, 4))), axis=1)

    _, _, latents, timestep = run(lambda x, t: x, clean, kind="fm_warp")
    sigma = timestep / 1000
    left, rate = jax.jit(lambda s: jax.jvp(share, (s,), (jnp.ones_like(s),)))(sigma)
    assert abs(left - sigma).max() > 0.01  # not flow matching's clock
    np.testing.assert_allclose(latents, clean + per_frame(left)[..., None] * back, atol=1e-5)
    _, terms, _, _ = run(lambda x, t: per_frame(rate)[..., None] * back, clean, kind="fm_warp")
    np.testing.assert_allclose(terms["mse"], 0, atol=1e-9)


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_train_on_degenerate_clips(control):
    for kind in DEGENERATE:
        clean, noise = degenerate(kind, 3)
        sigma = jnp.asarray([0.999, 0.8, 0.5, 0.2, 0.005], jnp.float32)

        def total(scale, clean=clean, noise=noise, sigma=sigma):
            config = ObjectiveConfig(kind=control)
            return jnp.mean(OBJECTIVES[control](lambda x: scale * x, clean, noise, sigma, config)[0])

        value, slope = jax.jit(jax.value_and_grad(total))(jnp.float32(0.5))
        assert np.isfinite(value)
        assert np.isfinite(slope)


def test_a_prediction_that_is_not_a_number_is_not_hidden():
    clean, noise = (jax.random.normal(jax.random.key(n), (1, 3, 2, 2, 4)) for n in range(2))
    x_t = temporal_path(clean, noise, jnp.array([0.5])).x_t
    prediction = jnp.ones_like(clean).at[0, 1, 0, 0, 0].set(jnp.nan)
    assert np.isnan(temporal_loss(prediction, clean, noise, x_t)).all()
