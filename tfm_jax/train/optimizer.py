"""AdamW for the adapters, each rule masked to the factors it is meant for."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from tfm_jax.arrays import Scalar
from tfm_jax.config import OptimizerConfig

FACTORS = ("lora_a", "lora_b")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW as in torch: decoupled decay, scaled by the learning rate of its factor.

    B learns `lora_b_factor` times as fast as A (LoRA+, Hayou et al. 2024).
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_factors(*FACTORS)),
        optax.masked(optax.scale(config.lora_b_factor), _factors("lora_b")),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate(config)),
    )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Update (from 0) -> learning rate of the A factors: a linear warm-up that does not begin at 0, then constant."""
    warmup = optax.linear_schedule(
        config.learning_rate / (config.warmup_steps + 1), config.learning_rate, config.warmup_steps
    )
    return warmup if config.warmup_steps else optax.constant_schedule(config.learning_rate)


def last_learning_rate(state: Any) -> Scalar:
    """The learning rate of the update that led to this state of the optimizer."""
    return state[-1].hyperparams["learning_rate"]


def _factors(*names: str) -> Callable[[Any], Any]:
    """A mask over a tree of adapters: true at the leaves of these factors."""

    def mask(tree: Any) -> Any:
        def chosen(path: tuple, _: Any) -> bool:
            return any(getattr(key, "key", None) in names for key in path)

        return jax.tree.map_with_path(chosen, tree)

    return mask
