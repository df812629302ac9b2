"""`diffusers.WanPipeline` samples the same latents and the same pixels, from the same weights, text and noise."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from einops import rearrange
from helpers.paths import WAN_TINY
from helpers.wan_reference import relative

from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.sampling import sample_latents
from tfm_jax.wan import load_transformer, load_vae

STEPS, SHIFT = 20, 5.0
SHAPES = [(17, 64, 64), (5, 32, 48)]
"""Frames, height and width in pixels."""


class OurEuler(FlowMatchEulerDiscreteScheduler):
    """Euler steps on the levels of the TFM release; by itself, diffusers ends at another level before 0."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=device)


SCHEDULERS = {
    "euler": OurEuler(shift=SHIFT),
    "unipc": UniPCMultistepScheduler(
        solver_order=2, solver_type="bh2", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    ),
}


@pytest.fixture(scope="module", params=["wan_tiny", "random"])
def networks(request, model):
    """The pipeline of diffusers, our transformer and our autoencoder, all from one folder."""
    folder: Path = WAN_TINY if request.param == "wan_tiny" else model
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, load_transformer(folder, jnp.float32), load_vae(folder)


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """Return the PSNR of pixels in 0..1."""
    return float(-10 * np.log10(np.mean(np.square(np.float64(a) - np.float64(b)))))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_latents_and_pixels(networks, shape):
    pipeline, transformer, vae = networks
    frames, height, width = shape
    size = (1, (frames - 1) // 4 + 1, height // 8, width // 8, 16)
    noise = jax.random.normal(jax.random.key(0), size)
    text = jax.random.normal(jax.random.key(1), (2, TEXT_LENGTH, transformer.config.text_dim))
    embeddings = [torch.from_numpy(np.array(text[n : n + 1])) for n in range(2)]
    for solver, scheduler in SCHEDULERS.items():
        pipeline.scheduler = scheduler
        for guidance in (5.0, 1.0) if shape == SHAPES[1] else (5.0,):
            options = {"guidance": guidance, "steps": STEPS, "shift": SHIFT, "solver": solver}
            ours = np.asarray(sample_latents(transformer, noise, text[:1], text[1:], **options))
            theirs = pipeline(
                prompt_embeds=embeddings[0], negative_prompt_embeds=embeddings[1], guidance_scale=guidance,
                num_frames=frames, height=height, width=width, num_inference_steps=STEPS, output_type="latent",
                latents=torch.from_numpy(np.array(rearrange(noise, "b f h w c -> b c f h w"))),
            ).frames  # fmt: skip
            theirs = rearrange(theirs.numpy(), "b c f h w -> b f h w c")
            assert relative(ours, theirs) <= 1e-4, (solver, guidance)
        pixels = [np.asarray(vae.decode(jnp.asarray(x))) / 2 + 0.5 for x in (ours, theirs)]
        assert decibels(*pixels) >= 45, solver
