"""The embedded model: a tiny Wan2.1 of the same architecture, made on the spot with random weights.

This is the place of its trained successor: whatever `write_model` leaves in `directory` is what the demo fine-tunes.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import jax.numpy as jnp
from flax import nnx

from tfm_jax.embedded.tokenizer import write_tokenizer
from tfm_jax.wan.layouts import TEXT_ENCODER, TRANSFORMER, VAE, source_of
from tfm_jax.wan.saving import save_model
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer
from tfm_jax.wan.vae import VaeConfig, WanVae

TEXT_DIM = 64
VOCABULARY = 256


def write_model(directory: Path, captions: list[str], seed: int = 0) -> None:
    """Write transformer, autoencoder, text encoder and a tokenizer for `captions` in the Diffusers layout.

    Sizes are those of `configs/wan_tiny.yaml`.

    Raises:
        InputError: `directory` exists and is not empty.
    """
    transformer = WanTransformer(
        TransformerConfig(dim=96, ffn_dim=256, heads=4, layers=4, text_dim=TEXT_DIM),
        rngs=nnx.Rngs(seed),
        dtype=jnp.float32,
    )
    vae = WanVae(VaeConfig(base_dim=16), rngs=nnx.Rngs(seed + 1))
    with TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer")
        write_tokenizer(tokenizer, captions, VOCABULARY)
        text_encoder = UMT5Encoder(
            TextEncoderConfig(vocab_size=VOCABULARY, dim=TEXT_DIM, heads=4, head_dim=16, ffn_dim=128, layers=2),
            rngs=nnx.Rngs(seed + 2),
        )
        networks = ((transformer, TRANSFORMER), (vae, VAE), (text_encoder, TEXT_ENCODER))
        sources = [source_of(module, component) for module, component in networks]
        save_model(sources, tokenizer, directory, "diffusers", jnp.float32)
