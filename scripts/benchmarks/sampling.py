"""A guided denoising step and a whole short sample, decoding included, beside diffusers' `WanPipeline`."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from benchmarks import ours, peers
from benchmarks.sizes import Sizes, Work
from benchmarks.timing import Program, Row, race
from tfm_jax.sampling import sample_latents

SUBJECT, PEER = "sampling", "diffusers' WanPipeline"
GUIDANCE, SHIFT = 5.0, 5.0
BASE_DIM = {"cpu": 16, "gpu": 96}
"""Width of the autoencoder."""


def measure(sizes: Sizes) -> Iterator[Row]:
    for work in sizes.sampling:
        names = "one guided step", f"a sample of {sizes.sampling_steps} guided steps, decoded"
        for name, run, peer in zip(names, our_samplers(work, sizes), peer_samplers(work, sizes), strict=True):
            yield race(SUBJECT, f"{name}, {work}", run, PEER, peer, sizes.budget)


def our_samplers(work: Work, sizes: Sizes) -> list[Program]:
    """Return programs that take one step, and that make a video."""
    model, vae = ours.transformer(work.config, sizes), ours.autoencoder(BASE_DIM[sizes.device])
    latents, text = ours.inputs(work)
    noise, text = jnp.asarray(latents), jnp.asarray(text, sizes.dtype)

    def sample(steps: int) -> jax.Array:
        return sample_latents(model, noise, text, -text, steps=steps, shift=SHIFT, guidance=GUIDANCE)

    return [
        lambda: jax.block_until_ready(sample(1)),
        lambda: jax.block_until_ready(list(vae.decode_in_chunks(sample(sizes.sampling_steps)))),
    ]


def peer_samplers(work: Work, sizes: Sizes) -> list[Program]:
    nothing: Any = None
    pipeline = WanPipeline(
        tokenizer=nothing,
        text_encoder=nothing,
        vae=peers.autoencoder(BASE_DIM[sizes.device], sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=peers.transformer(work.config, sizes),
    )
    pipeline.set_progress_bar_config(disable=True)
    latents, text = ours.inputs(work)
    noise = peers.tensor(peers.channels_first(latents), sizes, torch.float32)
    embeddings = peers.tensor(text, sizes)
    frames, height, width = work.size

    def sample(steps: int, output: str) -> Any:
        return pipeline(
            prompt_embeds=embeddings, negative_prompt_embeds=-embeddings, guidance_scale=GUIDANCE,
            num_inference_steps=steps, num_frames=4 * (frames - 1) + 1, height=8 * height, width=8 * width,
            latents=noise, output_type=output,
        )  # fmt: skip

    return [
        peers.program(sizes, lambda: sample(1, "latent").frames),
        peers.program(sizes, lambda: sample(sizes.sampling_steps, "pt").frames),
    ]
