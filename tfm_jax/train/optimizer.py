"""AdamW for the adapters, with a separate learning rate for their B factors."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from tfm_jax.arrays import Scalar
from tfm_jax.config import OptimizerConfig

FACTORS = ("lora_a", "lora_b")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW as in torch, with decoupled weight decay that is scaled by the learning rate of each factor.

    The learning rate of B is `lora_b_factor` times that of A (LoRA+, Hayou et al. 2024).
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_factors(*FACTORS)),
        optax.masked(optax.scale(config.lora_b_factor), _factors("lora_b")),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate(config)),
    )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of the A factors at update 0, 1, ...: a linear warm-up that starts above 0, then constant."""
    warmup = optax.linear_schedule(
        config.learning_rate / (config.warmup_steps + 1), config.learning_rate, config.warmup_steps
    )
    return warmup if config.warmup_steps else optax.constant_schedule(config.learning_rate)


def last_learning_rate(state: Any) -> Scalar:
    """The learning rate of the last update, from the state of the optimizer after it."""
    return state[-1].hyperparams["learning_rate"]


def _factors(*names: str) -> Callable[[Any], Any]:
    """A function that masks a tree of adapters: true for the leaves of these factors."""

    def mask(tree: Any) -> Any:
        def is_selected(path: tuple, _: Any) -> bool:
            return any(getattr(key, "key", None) in names for key in path)

        return jax.tree.map_with_path(is_selected, tree)

    return mask
