"""Writes a Wan2.1 model with random weights, smaller than the embedded one, for the tests of the programs."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp
import numpy as np

from tfm_jax.moving_shapes.tokenizer import write_tokenizer
from tfm_jax.wan.components import COMPONENTS, Component, abstract_parameters
from tfm_jax.wan.saving import save_model
from tfm_jax.wan.sources import Source
from tfm_jax.wan.tensors import LazyTensor
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.transformer import TransformerConfig
from tfm_jax.wan.vae import VaeConfig

TEXT_DIM = 64
VOCABULARY = 256


def write_model(directory: Path, captions: list[str], seed: int = 0) -> None:
    """Write transformer, autoencoder, text encoder and a tokenizer for `captions` in the Diffusers layout."""
    configs = (
        TransformerConfig(dim=96, ffn_dim=256, heads=4, layers=4, text_dim=TEXT_DIM),
        VaeConfig(base_dim=16),
        TextEncoderConfig(vocab_size=VOCABULARY, dim=TEXT_DIM, heads=4, head_dim=16, ffn_dim=128, layers=2),
    )
    rng = np.random.default_rng(seed)
    sources = [random_source(component, config, rng) for component, config in zip(COMPONENTS, configs, strict=True)]
    with TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer")
        write_tokenizer(tokenizer, captions, VOCABULARY)
        save_model(sources, tokenizer, directory, "diffusers", jnp.float32)


def random_source(component: Component, config: Any, rng: np.random.Generator) -> Source:
    """Draw the weights of a network with NumPy: to compile an initialisation in JAX takes longer than the tests."""
    tensors = {}
    for name, like in abstract_parameters(component, config, jnp.float32).items():
        kind = name.rpartition(".")[2]
        if kind in ("scale", "gamma", "bias"):
            value = np.full(like.shape, kind != "bias", np.float32)
        else:
            stacked = name.startswith("blocks.")  # the first axis is the layer
            value = rng.standard_normal(like.shape, np.float32) / math.sqrt(math.prod(like.shape[stacked:-1]))
        tensors[name] = LazyTensor(like.shape, Path("memory"), value.__getitem__)
    return Source(component, "tfm_jax", config, Path("memory"), tensors)
