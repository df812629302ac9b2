"""Noise levels: the grid, the loss weights, and how training samples the grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tfm_clips import CASES, golden

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
