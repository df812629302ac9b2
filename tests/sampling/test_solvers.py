"""The noise levels, the Euler solver and guidance, against diffusers' scheduler and transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flax import nnx
from helpers.wan_reference import SIZES, inputs, reference_transformer, relative, run_reference

from tfm_jax.sampling import sample_latents
from tfm_jax.sampling.solvers import euler, noise_levels
from tfm_jax.wan import load_transformer
from tfm_jax.wan.transformer import WanTransformer

CONFIG = SIZES["small"]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# --- Noise levels and the solver -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (50, 1.0), (7, 3.0), (1, 5.0)])
def test_levels_are_those_of_the_specification(steps, shift):
    even = np.linspace(1, 0, steps + 1)[:-1]
    levels = np.asarray(noise_levels(steps, shift))
    np.testing.assert_allclose(levels[:-1], shift * even / (1 + (shift - 1) * even), rtol=1e-6)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_a_straight_path_ends_at_the_clean_video(steps):
    """The velocity (x - clean) / sigma always points away from the clean video."""
    clean, noise = normal(0, 2, 3, 4, 4, 5), normal(1, 2, 3, 4, 4, 5)
    result = euler(lambda x, sigma: (x - clean) / sigma, noise, noise_levels(steps, 5.0))
    np.testing.assert_allclose(result, clean, atol=2e-6)


def test_a_linear_field_multiplies_by_every_step():
    noise, levels = normal(0, 1, 2, 2, 2, 3), noise_levels(10, 5.0)
    result = euler(lambda x, sigma: (0.5 + sigma) * x, noise, levels)
    factors = 1 + np.diff(np.float64(levels)) * (0.5 + np.float64(levels[:-1]))
    np.testing.assert_allclose(result, noise * np.prod(factors), rtol=1e-5)


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


# --- Against diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_loop_equals_diffusers(tmp_path, guidance):
    steps, shift = 4, 5.0
    reference = reference_transformer(CONFIG)
    reference.save_pretrained(tmp_path / "transformer")
    batch, text = inputs(CONFIG, 1, 3, 4, 6), jnp.asarray(inputs(CONFIG, 2, 1, 2, 2, seed=1)["text"])
    ours = sample_latents(
        load_transformer(tmp_path, jnp.float32), jnp.asarray(batch["latents"]), text[:1], text[1:],
        steps=steps, shift=shift, guidance=guidance,
    )  # fmt: skip

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    x = torch.from_numpy(batch["latents"])
    for timestep in scheduler.timesteps:
        t = timestep.numpy().reshape(1)
        positive, negative = (
            run_reference(reference, {"latents": x.numpy(), "timestep": t, "text": np.asarray(text[n : n + 1])})
            for n in (0, 1)
        )
        velocity = torch.from_numpy(negative + guidance * (positive - negative))
        x = scheduler.step(velocity, timestep, x).prev_sample
    assert len(scheduler.timesteps) == steps
    assert relative(ours, x.numpy()) <= 1e-4
