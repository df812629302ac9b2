"""AdamW for the adapters, with a separate learning rate for their B factors."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from tfm_jax.arrays import Scalar
from tfm_jax.config import OptimizerConfig

FACTORS = ("lora_a", "lora_b")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return AdamW as in PyTorch: the weight decay is decoupled, and scaled by the learning rate of each factor.

    The learning rate of B is `lora_b_factor` times that of A (LoRA+, Hayou et al. 2024). The gradient is first clipped
    to the global norm `max_grad_norm`, if one is set.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_factors(*FACTORS)),
        optax.masked(optax.scale(config.lora_b_factor), _factors("lora_b")),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate(config)),
    )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Return the schedule of the learning rate of A: a linear warm-up that starts above 0, then a constant."""
    warmup = optax.linear_schedule(
        config.learning_rate / (config.warmup_steps + 1), config.learning_rate, config.warmup_steps
    )
    return warmup if config.warmup_steps else optax.constant_schedule(config.learning_rate)


def last_learning_rate(state: Any) -> Scalar:
    """Return the learning rate of A in the last update, given the optimizer state after that update."""
    return state[-1].hyperparams["learning_rate"]


def _factors(*names: str) -> Callable[[Any], Any]:
    """Return a function that maps a tree of adapters to a mask, which is true for the leaves of these factors."""

    def mask(tree: Any) -> Any:
        def is_selected(path: tuple, _: Any) -> bool:
            return any(getattr(key, "key", None) in names for key in path)

        return jax.tree.map_with_path(is_selected, tree)

    return mask
