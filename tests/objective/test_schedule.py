"""Noise levels: the grid, the loss weights, and how training samples the grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tfm_clips import CASES, golden

from tfm_jax.config import ObjectiveConfig
from tfm_jax.errors import InputError
from tfm_jax.objective import schedule, shift_sigma


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
    weight, sigma = schedule.bell_weights(5.0), schedule.sigmas(5.0)
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
    np.testing.assert_allclose(schedule.bell_weights()[g["timestep_index"]], g["loss_weight"], rtol=1e-6, atol=1e-6)


def test_min_snr_weights_are_those_of_the_clean_latents():
    """min(SNR, 5) times the squared error of x_t - sigma v, for an error of 1 in v."""
    sigma = 1 - np.arange(1000) / 1000  # no shift
    snr = ((1 - sigma) / sigma) ** 2
    expected = np.minimum(snr, 5) * sigma**2
    weight = schedule.WEIGHTS["min_snr"](1.0)
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight, 1000 * expected / expected.sum(), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(schedule.WEIGHTS["none"](5.0), np.ones(1000, np.float32))
    with pytest.raises(ValueError, match="min_snr: expected bell or none, because kind=tfm is not fm"):
        ObjectiveConfig(weight="min_snr")


def draw_indices(count, seed=0, **settings):
    return np.asarray(schedule.sample_index(jax.random.key(seed), count, ObjectiveConfig(**settings)))


def test_indices_are_uniform_over_the_part_of_the_grid():
    index = draw_indices(20000, low=0.25, high=0.75)
    assert (index.min(), index.max()) == (250, 749)
    counts = np.histogram(index, bins=10, range=(250, 750))[0]
    assert np.all(np.abs(counts - 2000) < 6 * np.sqrt(2000))
    np.testing.assert_array_equal(draw_indices(3, 1, low=0.5, high=0.501), 500)
    # The draws of earlier versions, so that their runs can be resumed.
    np.testing.assert_array_equal(draw_indices(20), jax.random.randint(jax.random.key(0), (20,), 0, 1000, jnp.int32))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.7)])
def test_logit_normal_indices(low, high):
    """Against 2 million draws of NumPy, rounded to the grid."""
    logit = np.random.default_rng(0).normal(0.5, 0.8, 2_000_000)
    fraction = 1 - 1 / (1 + np.exp(-logit))
    fraction = fraction[(fraction >= low) & (fraction < high)]
    index = draw_indices(50000, law="logit_normal", logit_mean=0.5, logit_std=0.8, low=low, high=high)
    assert index.dtype == np.int32
    assert 1000 * low <= index.min() <= index.max() < 1000 * high
    expected, found = (np.histogram(x, bins=20, range=(low, high))[0] / len(x) for x in (fraction, index / 1000))
    assert np.all(np.abs(found - expected) < 6 * np.sqrt(expected / 50000) + 1e-4)
    assert np.mean(index) < 500  # a mean above 0 favours noisier levels, which come first
    np.testing.assert_allclose(schedule.logit_normal(0.5, 0.8).sum(), 1, rtol=1e-12)


def test_an_empty_part_of_the_grid_is_refused():
    with pytest.raises(InputError, match=r"objective.low=0.5, objective.high=0.5001: expected"):
        draw_indices(1, low=0.5, high=0.5001)
    with pytest.raises(InputError, match=r"logit_mean=50.0, objective.logit_std=0.1: draw no level between low=0.5"):
        draw_indices(1, law="logit_normal", logit_mean=50, logit_std=0.1, low=0.5)
