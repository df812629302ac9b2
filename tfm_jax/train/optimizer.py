"""AdamW for the adapters, with a separate learning rate for their B factors."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from tfm_jax.arrays import Scalar
from tfm_jax.config import OptimizerConfig
from tfm_jax.errors import InputError

FACTORS = ("lora_a", "lora_b")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW as in PyTorch: the weight decay is decoupled, and scaled by the learning rate of each factor.

    The learning rate of B is `lora_b_factor` times that of A (LoRA+, Hayou et al. 2024). The gradient is first clipped
    to the global norm `max_grad_norm`, if one is set.

    Args:
        steps: number of steps of the run, over which the learning rate falls.

    Raises:
        InputError: the learning rate should fall after the warm-up, but the warm-up is as long as the run.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_factors(*FACTORS)),
        optax.masked(optax.scale(config.lora_b_factor), _factors("lora_b")),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate(config, steps)),
    )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule of the learning rate of A: a linear warm-up that starts above 0, then `config.schedule`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule != "constant" and warmup >= steps:
        expected = f"expected less than the {steps} steps of the run, for optimizer.schedule={config.schedule}"
        raise InputError(f"optimizer.warmup_steps={warmup}: {expected}")
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup, config.final_factor),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final_factor, steps - warmup),
    }[config.schedule]()
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup]) if warmup else after


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
