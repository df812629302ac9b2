"""Our networks with random weights, and programs that run them."""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sizes import Sizes, Work
from benchmarks.timing import Program
from tfm_jax.config import LoraConfig, ObjectiveConfig, OptimizerConfig, Remat
from tfm_jax.data.batches import Batch
from tfm_jax.lora.adapters import LoraSplit, attach_lora, init_lora, split_lora
from tfm_jax.sharding import one_device_mesh
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.train.step import Step, TrainState, init_state, make_step
from tfm_jax.wan.components import TEXT_ENCODER, TRANSFORMER, VAE, Component, abstract_model, named_parameters
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer
from tfm_jax.wan.vae import VaeConfig, WanVae


def inputs(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Draw latents `[b f h w c]` and text `[b l d]` in float32, the same for us and for the peers."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal(work.shape, np.float32)
    return latents, rng.standard_normal((work.batch, work.config.text_len, work.config.text_dim), np.float32)


def transformer(config: TransformerConfig, sizes: Sizes) -> WanTransformer:
    return filled(TRANSFORMER, config, sizes.dtype)


def autoencoder(base_dim: int) -> WanVae:
    """Return our autoencoder, which computes in float32 on every device."""
    return filled(VAE, VaeConfig(base_dim=base_dim), "float32")


def text_encoder(config: TextEncoderConfig, sizes: Sizes) -> UMT5Encoder:
    return filled(TEXT_ENCODER, config, sizes.dtype)


def filled(component: Component, config: Any, dtype: str) -> Any:
    """Return a network with arbitrary weights, made with NumPy because JAX would compile their initialisation."""
    module: Any = abstract_model(component, config, dtype)
    block = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
    for variable in named_parameters(module).values():
        like = variable.get_value()
        scale = 1 / math.sqrt(math.prod(like.shape[-5:-1]) or 1)
        variable.set_value(jnp.asarray(np.resize(block, like.shape) * np.float32(scale), like.dtype))
    return module


def adapted(work: Work, sizes: Sizes) -> LoraSplit:
    """Return our transformer with adapters."""
    model = transformer(work.config, sizes)
    attach_lora(model, LoraConfig(rank=work.rank, alpha=work.rank))
    init_lora(model, jax.random.key(0))
    return split_lora(model)


def batch(work: Work, sizes: Sizes) -> Batch:
    latents, text = inputs(work)
    return Batch(jnp.asarray(latents, sizes.dtype), jnp.asarray(text, sizes.dtype))


def training_step(split: LoraSplit, remat: Remat) -> tuple[Step, TrainState]:
    """Return the step of `tfm-train` and the state before the first step. It trains with plain flow matching."""
    optimizer = make_optimizer(OptimizerConfig(), 1)
    # The first step gives the memory of its state away, and all policies start from the same adapters.
    state, placement = init_state(jax.tree.map(jnp.copy, split.lora), optimizer, one_device_mesh())
    return make_step(split.graph, optimizer, ObjectiveConfig(kind="fm"), 0, placement, remat), state


def training(split: LoraSplit, data: Batch, remat: Remat) -> Program:
    """Compile a step, and return a program that takes it."""
    step, state = training_step(split, remat)
    compiled = cast(Any, step).lower(state, split.frozen, data).compile()

    def run() -> Any:
        nonlocal state
        state, report = compiled(state, split.frozen, data)
        return jax.block_until_ready((state, report))

    return run
