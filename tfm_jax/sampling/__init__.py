"""Sample videos from prompts: the flow ODE, guidance, and the sampling run."""

from tfm_jax.sampling.loop import sample_latents

__all__ = ["sample_latents"]
