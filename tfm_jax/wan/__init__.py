"""Wan2.1-T2V in Flax: the transformer, the video autoencoder, the text encoder, and functions that load them."""

from tfm_jax.wan.loading import find_base, load_base, load_text_encoder, load_tokenizer, load_transformer, load_vae

__all__ = ["find_base", "load_base", "load_text_encoder", "load_tokenizer", "load_transformer", "load_vae"]
