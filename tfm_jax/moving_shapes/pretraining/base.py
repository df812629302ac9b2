"""Stage two: trains the transformer and the text encoder together, by flow matching on the latents of clips."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from tfm_jax.arrays import TEXT_LENGTH, Latents, PerVideo, Scalar, TokenIds
from tfm_jax.config import ObjectiveConfig
from tfm_jax.moving_shapes.pretraining.fitting import Batch, Stage, fit
from tfm_jax.moving_shapes.pretraining.network import initialise, make_optimizer
from tfm_jax.objective import timestep
from tfm_jax.objective.losses import flow_matching
from tfm_jax.objective.schedule import shift_sigma
from tfm_jax.wan.components import TEXT_ENCODER, TRANSFORMER
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer


class BaseRecipe(NamedTuple):
    """Settings for training the transformer and the text encoder."""

    steps: int
    batch: int = 32
    learning_rate: float = 1e-2
    """Peak value. After a short warm-up, the learning rate follows half a cosine to zero."""
    vector_lr_factor: float = 0.5
    """Learning rate of norms, biases and embeddings, relative to that of the kernels."""
    padded_every: int = 16
    """Every how many steps the text is padded to 512 tokens, more than in sampling. Such a step takes more than twice
    the time. With few of them, the network learns to ignore padding, however much there is."""
    caption_dropout: float = 0.1
    """Fraction of the captions that are replaced by the empty caption, so that guidance works."""
    shift: float = 3.0
    """Shifts the noise levels, which are otherwise uniform, towards 1."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is the result of the training."""


class CaptionTokens(NamedTuple):
    """Token ids and masks: one row for the caption of each clip, and a last row for the empty caption."""

    ids: Int[np.ndarray, "n l"]
    mask: Int[np.ndarray, "n l"]


class Networks(NamedTuple):
    """The two networks that are trained in this stage, or their weights."""

    transformer: Any
    text_encoder: Any


class BaseState(NamedTuple):
    """What changes during the training."""

    weights: Any
    moments: Any
    average: Any
    """The exponential moving average of the weights."""


class BaseBatch(NamedTuple):
    """The arrays of a step."""

    clean: Latents
    ids: TokenIds
    mask: Int[Array, "b u"]
    """Padded with zeros to the number of text tokens that the transformer gets."""
    key: jax.Array


def train_base(
    latents: Float[np.ndarray, "n f h w c"], captions: CaptionTokens,
    configs: tuple[TransformerConfig, TextEncoderConfig], recipe: BaseRecipe, seed: int, output: Path,
) -> tuple[WanTransformer, UMT5Encoder]:  # fmt: skip
    """Train the two networks on latents and their captions.

    The log, `base.jsonl`, and the checkpoints are written into `output`.
    """
    networks = Networks(initialise(TRANSFORMER, configs[0], seed), initialise(TEXT_ENCODER, configs[1], seed + 1))
    networks.transformer.remat = "attention"  # on a CPU, recomputing the rest is faster than storing it
    graph, weights = nnx.split(networks)
    optimizer = make_optimizer(recipe.learning_rate, recipe.vector_lr_factor, recipe.steps)
    key = jax.random.key(seed)

    def batch_of(number: int) -> Batch:
        rng = np.random.default_rng((seed, number))
        clips = rng.integers(len(latents), size=recipe.batch)
        rows = np.where(rng.random(recipe.batch) < recipe.caption_dropout, len(captions.ids) - 1, clips)
        mask = captions.mask[rows]
        if number % recipe.padded_every == 0:
            mask = np.pad(mask, ((0, 0), (0, TEXT_LENGTH - mask.shape[1])))
        clean, ids, mask = jnp.asarray(latents[clips]), jnp.asarray(captions.ids[rows]), jnp.asarray(mask)
        return Batch(BaseBatch(clean, ids, mask, jax.random.fold_in(key, number)), clips.tolist())

    step_fn = jax.jit(partial(_step, graph, optimizer, recipe), donate_argnums=0)
    stage = Stage("base", output, f"{configs}, {recipe}, seed {seed}", recipe.batch, log_every=100)
    state = BaseState(weights, optimizer.init(weights), jax.tree.map(jnp.copy, weights))
    trained: Networks = nnx.merge(graph, fit(stage, step_fn, state, batch_of, recipe.steps).average)
    return trained.transformer, trained.text_encoder


def _step(
    graph: nnx.GraphDef, optimizer: Any, recipe: BaseRecipe, state: BaseState, batch: BaseBatch
) -> tuple[BaseState, dict[str, Scalar]]:
    clean = batch.clean
    noise_key, level_key = jax.random.split(batch.key)
    noise = jax.random.normal(noise_key, clean.shape)
    # Stratified noise levels, one per video, reduce the variance of the loss.
    levels = (jnp.arange(len(clean)) + jax.random.uniform(level_key, (len(clean),))) / len(clean)
    sigma: PerVideo = shift_sigma(levels, recipe.shift)

    def loss_of(weights: nnx.State) -> Scalar:
        networks: Networks = nnx.merge(graph, weights)
        text = pad_text(networks.text_encoder(batch.ids, batch.mask[:, : batch.ids.shape[1]]), batch.mask)

        def predict(x_t: Latents) -> Latents:
            return networks.transformer(x_t, timestep(sigma), text)

        return jnp.mean(flow_matching(predict, clean, noise, sigma, ObjectiveConfig(kind="fm"))[0])

    loss, gradient = jax.value_and_grad(loss_of)(state.weights)
    updates, moments = optimizer.update(gradient, state.moments, state.weights)
    weights: Any = optax.apply_updates(state.weights, updates)
    average = optax.incremental_update(weights, state.average, 1 - recipe.ema_decay)
    return BaseState(weights, moments, average), {"loss": loss, "grad_norm": optax.tree.norm(gradient)}


def pad_text(embeddings: Float[Array, "b l d"], mask: Int[Array, "b u"]) -> Float[Array, "b u d"]:
    """Set the embeddings of padding to zero and extend them to the length of the mask, as the transformer expects."""
    rows = jnp.pad(embeddings, ((0, 0), (0, mask.shape[1] - embeddings.shape[1]), (0, 0)))
    return jnp.where(mask[..., None] > 0, rows, 0)
