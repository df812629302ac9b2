"""Prompts -> videos: the flow ODE, guidance, and the program around them."""

from tfm_jax.sampling.pipeline import sample_latents

__all__ = ["sample_latents"]
