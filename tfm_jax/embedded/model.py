"""The embedded model: a tiny Wan2.1 of the same architecture, made on the spot with random weights.

This is the place of its trained successor: whatever `write_model` leaves in `directory` is what the demo fine-tunes.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tfm_jax.embedded.tokenizer import write_tokenizer
from tfm_jax.wan.layouts import COMPONENTS, Component, source_of
from tfm_jax.wan.saving import save_model
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.transformer import TransformerConfig
from tfm_jax.wan.vae import VaeConfig

TEXT_DIM = 64
VOCABULARY = 256


def write_model(directory: Path, captions: list[str], seed: int = 0) -> None:
    """Write transformer, autoencoder, text encoder and a tokenizer for `captions` in the Diffusers layout.

    Sizes are those of `configs/wan_tiny.yaml`.

    Raises:
        InputError: `directory` exists and is not empty.
    """
    configs = (
        TransformerConfig(dim=96, ffn_dim=256, heads=4, layers=4, text_dim=TEXT_DIM),
        VaeConfig(base_dim=16),
        TextEncoderConfig(vocab_size=VOCABULARY, dim=TEXT_DIM, heads=4, head_dim=16, ffn_dim=128, layers=2),
    )
    sources = []
    for number, (component, config) in enumerate(zip(COMPONENTS, configs, strict=True)):
        module = _random(component, config, seed + number)
        sources.append(source_of(module, component))
    with TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer")
        write_tokenizer(tokenizer, captions, VOCABULARY)
        save_model(sources, tokenizer, directory, "diffusers", jnp.float32)


def _random(component: Component, config: Any, seed: int) -> nnx.Module:
    """Compiled as a whole: number by number, drawing them takes minutes."""
    return jax.jit(
        lambda: component.build(config, rngs=nnx.Rngs(jax.random.key(seed, impl="rbg")), dtype=jnp.float32)
    )()
