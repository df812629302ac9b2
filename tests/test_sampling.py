"""Sampling: the noise levels, the Euler loop and guidance, against diffusers' scheduler and transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flax import nnx
from wan_reference import SIZES, inputs, reference_transformer, relative, run_reference

from tfm_jax.config import ClipConfig, ModelConfig, SamplingConfig
from tfm_jax.errors import InputError
from tfm_jax.sampling import pipeline, sample_latents
from tfm_jax.sampling.pipeline import SampleRun, read_prompts, sample
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
    """The velocity (x - clean) / sigma points from every point of the path away from its end."""
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
    """Stands for the network: its velocity is the mean of the text, and it notes the shapes that it is called with."""

    calls: tuple = ()

    def __init__(self):
        self.config = CONFIG
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, latents, timestep, text):
        TextMean.calls += ((latents.shape, timestep.shape, text.shape),)
        return latents * 0 + self.weight[...] * text.mean((1, 2))[:, None, None, None, None]


@pytest.mark.parametrize(("guidance", "rows"), [(5.0, 6), (0.0, 6), (1.0, 3)])
def test_guidance(guidance, rows):
    """v(negative) + guidance (v(text) - v(negative)) from one call a step; guidance 1 does without the negative."""
    TextMean.calls = ()
    noise, text, negative = normal(0, 3, 2, 4, 4, 5), normal(1, 3, 8, 6), normal(2, 3, 8, 6)
    result = sample_latents(TextMean(), noise, text, negative, steps=4, guidance=guidance)
    assert TextMean.calls == (((rows, 2, 4, 4, 5), (rows,), (rows, 8, 6)),)  # traced once: the loop is a scan
    of_text, of_negative = (np.asarray(x.mean((1, 2))) for x in (text, negative))
    velocity = of_negative + guidance * (of_text - of_negative)
    np.testing.assert_allclose(result, noise - velocity[:, None, None, None, None], atol=1e-5)


def test_on_step_is_called_once_a_step():
    count = []
    noise, text = normal(0, 1, 1, 2, 2, 3), normal(1, 1, 8, 6)
    sample_latents(TextMean(), noise, text, text, steps=7, on_step=lambda: count.append(1)).block_until_ready()
    jax.effects_barrier()
    assert len(count) == 7


# --- Against diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_loop_equals_diffusers(tmp_path, guidance):
    steps, shift = 4, 5.0
    reference = reference_transformer(CONFIG)
    reference.save_pretrained(tmp_path / "transformer")
    batch, text = inputs(CONFIG, 1, 3, 4, 6), inputs(CONFIG, 2, 1, 2, 2, seed=1)["text"]
    ours = sample_latents(
        load_transformer(tmp_path, jnp.float32), batch["latents"], text[:1], text[1:],
        steps=steps, shift=shift, guidance=guidance,
    )  # fmt: skip

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    x = torch.from_numpy(batch["latents"])
    for time in scheduler.timesteps:
        t = time.numpy().reshape(1)
        positive, negative = (
            run_reference(reference, {"latents": x.numpy(), "timestep": t, "text": text[n : n + 1]}) for n in (0, 1)
        )
        velocity = torch.from_numpy(negative + guidance * (positive - negative))
        x = scheduler.step(velocity, time, x).prev_sample
    assert len(scheduler.timesteps) == steps
    assert relative(ours, x.numpy()) <= 1e-4


# --- A run -----------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_number(tmp_path, monkeypatch):
    """Of nothing else: the other prompts do not change what prompt number n starts from."""
    noises = []

    def record(transformer, noise, *arguments, **options):
        noises.append(np.asarray(noise))
        return noise

    monkeypatch.setattr(pipeline.layouts, "find", lambda *_: None)
    monkeypatch.setattr(pipeline, "find_base", lambda _: None)
    monkeypatch.setattr(pipeline, "_embed", lambda _, prompts: jnp.zeros((len(prompts), 512, CONFIG.text_dim)))
    monkeypatch.setattr(pipeline, "load_base", lambda _, mesh: TextMean())
    monkeypatch.setattr(pipeline, "sample_latents", record)
    monkeypatch.setattr(pipeline, "_write", lambda *_: None)

    def start(name: str, prompts: list[str], seed: int) -> list[np.ndarray]:
        noises.clear()
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        size = {name: getattr(CONFIG, name) for name in ("dim", "ffn_dim", "heads", "layers")}
        sample(
            SampleRun(
                model=ModelConfig(path=tmp_path, **size),
                clip=ClipConfig(frames=5, height=32, width=48),
                sampling=SamplingConfig(prompts=tmp_path / "prompts.txt", output=tmp_path / name, seed=seed),
            )
        )
        return list(noises)

    three, two, other = start("a", ["x", "y", "z"], 3), start("b", ["w", "y"], 3), start("c", ["x", "y"], 4)
    assert [noise.shape for noise in three] == [(1, 2, 4, 6, 16)] * 3
    np.testing.assert_array_equal(three[:2], two)
    different = [*three, *other]
    assert len({noise.tobytes() for noise in different}) == len(different)
    assert np.std(three[0]) == pytest.approx(1, abs=0.1)


def test_prompts_are_the_lines_that_are_not_blank(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  一只猫 🐈 \n\t\n".encode())
    assert read_prompts(file) == ["a cat", "一只猫 🐈"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b" \n\n", "no prompt in it"), (b"\xff\xfe\x00", "not UTF-8"), ("folder", "directory")],
)
def test_no_prompts(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=rf"sampling\.prompts=.*prompts\.txt: .*{message}.*expected"):
        read_prompts(file)
