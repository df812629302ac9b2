"""The noise levels, the solvers and guidance, with fake networks. test_with_diffusers.py compares whole samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from flax import nnx
from helpers.wan_reference import SIZES, relative

from tfm_jax.sampling import sample_latents
from tfm_jax.sampling.solvers import Steps, begin, make_steps, noise_levels, take_step
from tfm_jax.wan.transformer import WanTransformer

CONFIG = SIZES["small"]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def solve(velocity, noise: jax.Array, steps: Steps) -> jax.Array:
    """Take all steps; `velocity` maps latents and their noise level to the velocity."""
    state = begin(noise)
    for _ in steps.sigma:
        state = take_step(lambda x, sigma, number: velocity(x, sigma), steps, state)
    return state.x


# --- Noise levels and solvers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (50, 1.0), (7, 3.0), (1, 5.0)])
def test_levels_are_those_of_the_specification(steps, shift):
    even = np.linspace(1, 0, steps + 1)[:-1]
    levels = np.asarray(noise_levels(steps, shift))
    np.testing.assert_allclose(levels[:-1], shift * even / (1 + (shift - 1) * even), rtol=1e-6)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_straight_path_ends_at_the_clean_video(solver, steps):
    """The velocity (x - clean) / sigma always points away from the clean video."""
    clean, noise = normal(0, 1, 2, 2, 2, 3), normal(1, 1, 2, 2, 2, 3)
    table = make_steps(solver, steps, 5.0)
    sigma = dict(zip(table.level.tolist(), table.sigma.tolist(), strict=True))
    result = solve(lambda x, level: (x - clean) / sigma[float(level)], noise, table)
    np.testing.assert_allclose(result, clean, atol=2e-6)


def test_euler_multiplies_a_linear_field_by_every_step():
    noise, levels = normal(0, 1, 2, 2, 2, 3), noise_levels(10, 5.0)
    result = solve(lambda x, sigma: (0.5 + sigma) * x, noise, make_steps("euler", 10, 5.0))
    factors = 1 + np.diff(np.float64(levels)) * (0.5 + np.float64(levels[:-1]))
    np.testing.assert_allclose(result, noise * np.prod(factors), rtol=1e-5)


def curved(x, level):
    """A velocity that depends on everything, for NumPy, JAX and PyTorch."""
    return x * (1.5 - level) + x * x * 0.2 - 0.3


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (3, 1.0), (20, 5.0)])
@pytest.mark.parametrize("solver", ["unipc", "dpmpp_2m"])
def test_the_solvers_are_those_of_diffusers(solver, steps, shift):
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    reference = UniPCMultistepScheduler(solver_order=2, **options)
    reference.set_timesteps(steps)
    if solver == "dpmpp_2m":  # diffusers gives it other levels
        levels, timesteps = reference.sigmas, reference.timesteps
        reference = DPMSolverMultistepScheduler(solver_order=2, **options)
        reference.set_timesteps(steps)
        reference.sigmas, reference.timesteps = levels, timesteps
    noise = normal(0, 1, 2, 2, 2, 3)
    x = torch.from_numpy(np.array(noise))
    reference.set_begin_index(0)
    for timestep in reference.timesteps:
        x = reference.step(curved(x, timestep / 1000), timestep, x).prev_sample
    table = make_steps(solver, steps, shift)
    np.testing.assert_allclose(table.sigma, reference.sigmas[:-1])
    np.testing.assert_allclose(1000 * table.level, reference.timesteps, rtol=1e-6)
    assert relative(solve(curved, noise, table), x.numpy()) <= 1e-5


# --- Guidance --------------------------------------------------------------------------------------------------------


class TextMean(WanTransformer):
    """A fake network: its velocity is the mean of the text, and it records the shapes of its arguments."""

    calls: tuple = ()

    def __init__(self):
        self.config = CONFIG
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, latents, timestep, text):
        TextMean.calls += ((latents.shape, timestep.shape, text.shape),)
        return latents * 0 + self.weight[...] * text.mean((1, 2))[:, None, None, None, None]


@pytest.mark.parametrize(("guidance", "rows"), [(5.0, 6), (0.0, 6), (1.0, 3)])
def test_guidance(guidance, rows):
    """v(negative) + guidance (v(text) - v(negative)) with one call per step; guidance 1 leaves out the negative."""
    TextMean.calls = ()
    noise, text, negative = normal(0, 3, 2, 4, 4, 5), normal(1, 3, 8, 6), normal(2, 3, 8, 6)
    result = sample_latents(TextMean(), noise, text, negative, steps=4, guidance=guidance)
    assert TextMean.calls == (((rows, 2, 4, 4, 5), (rows,), (rows, 8, 6)),)  # traced once for all steps
    of_text, of_negative = (np.asarray(x.mean((1, 2))) for x in (text, negative))
    velocity = of_negative + guidance * (of_text - of_negative)
    np.testing.assert_allclose(result, noise - velocity[:, None, None, None, None], atol=1e-5)


def test_on_step_is_called_once_per_step():
    count = []
    noise, text = normal(0, 1, 1, 2, 2, 3), normal(1, 1, 8, 6)
    sample_latents(TextMean(), noise, text, text, steps=7, on_step=lambda: count.append(1))
    assert len(count) == 7


def test_an_exception_in_on_step_stops_the_sampling():
    count = []

    def on_step():
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt

    noise, text = normal(0, 1, 1, 2, 2, 3), normal(1, 1, 8, 6)
    with pytest.raises(KeyboardInterrupt):
        sample_latents(TextMean(), noise, text, text, steps=7, on_step=on_step)
    assert len(count) == 2


def test_guidance_in_a_part_of_the_steps():
    """Outside the interval only the text counts, so that the result lies between the two."""
    noise, text, negative = normal(0, 1, 2, 2, 2, 3), normal(1, 1, 8, 6), normal(2, 1, 8, 6)
    result = sample_latents(TextMean(), noise, text, negative, steps=10, shift=5.0, guidance_interval=(0.2, 0.5))
    of_text, of_negative = float(text.mean()), float(negative.mean())
    spans = -np.diff(np.float64(noise_levels(10, 5.0)))
    guided = of_negative + 5 * (of_text - of_negative)
    expected = guided * spans[2:5].sum() + of_text * (1 - spans[2:5].sum())
    np.testing.assert_allclose(noise - result, expected, rtol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_step_by_step_and_all_at_once_are_the_same(solver):
    noise, text = normal(0, 1, 2, 2, 2, 3), normal(1, 1, 8, 6)
    arguments = (TextMean(), noise, text, text)
    whole = sample_latents(*arguments, solver=solver, steps=5)
    watched = sample_latents(*arguments, solver=solver, steps=5, on_step=lambda: None)
    np.testing.assert_array_equal(whole, watched)
    assert (whole != sample_latents(*arguments, solver=solver, steps=5, until=4)).all()
