"""A Wan2.1 with random weights, smaller than the embedded one, in the Diffusers layout: for tests of programs."""

from pathlib import Path
from tempfile import TemporaryDirectory

import jax.numpy as jnp

from tfm_jax.embedded.tokenizer import write_tokenizer
from tfm_jax.pretraining.network import initialise
from tfm_jax.wan.layouts import COMPONENTS, source_of
from tfm_jax.wan.saving import save_model
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.transformer import TransformerConfig
from tfm_jax.wan.vae import VaeConfig

TEXT_DIM = 64
VOCABULARY = 256


def write_model(directory: Path, captions: list[str], seed: int = 0) -> None:
    """Write transformer, autoencoder, text encoder and a tokenizer for `captions`."""
    configs = (
        TransformerConfig(dim=96, ffn_dim=256, heads=4, layers=4, text_dim=TEXT_DIM),
        VaeConfig(base_dim=16),
        TextEncoderConfig(vocab_size=VOCABULARY, dim=TEXT_DIM, heads=4, head_dim=16, ffn_dim=128, layers=2),
    )
    sources = []
    for number, (component, config) in enumerate(zip(COMPONENTS, configs, strict=True)):
        sources.append(source_of(initialise(component, config, seed + number), component))
    with TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer")
        write_tokenizer(tokenizer, captions, VOCABULARY)
        save_model(sources, tokenizer, directory, "diffusers", jnp.float32)
