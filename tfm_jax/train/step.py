"""The training step: loss of a batch -> gradient of the adapters -> new adapters. One jitted function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from tfm_jax.arrays import Scalar
from tfm_jax.config import ObjectiveConfig, Remat
from tfm_jax.data.batches import Batch
from tfm_jax.objective import objective_loss
from tfm_jax.sharding import shardings


class TrainState(NamedTuple):
    """All that changes during a run."""

    step: Int[Array, ""]
    lora: nnx.State
    optimizer: Any


Step = Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Scalar]]]


def init_state(lora: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The state before the first step, and its shardings: the optimizer's moments are split as the adapters are."""

    def init(lora: nnx.State) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora))

    placement = shardings(jax.eval_shape(init, lora), mesh)
    return jax.jit(init, out_shardings=placement)(lora), placement


def make_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveConfig,
    seed: int,
    placement: TrainState,
    remat: Remat = "full",
) -> Step:
    """The jitted step (state, frozen weights, batch) -> (new state, what to report). The old state is consumed.

    Noise and noise levels depend on the seed and the number of the step alone, so that a resumed run repeats them.

    Args:
        graph: of the transformer with its adapters.
        placement: the sharding of every part of the state.
        remat: what the backward pass finds saved of each block, as `TrainConfig.remat`.
    """
    key = jax.random.key(seed)

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, dict[str, Scalar]]:
        def loss_of(lora: nnx.State) -> tuple[Scalar, dict[str, Scalar]]:
            velocity = nnx.merge(graph, lora, frozen)
            velocity.remat = remat
            step_key = jax.random.fold_in(key, state.step)
            clean, text = jnp.asarray(batch.latents), jnp.asarray(batch.text)
            return objective_loss(velocity, clean, text, step_key, objective)

        (loss, terms), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.lora)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.lora)
        lora: Any = optax.apply_updates(state.lora, updates)
        report = {"loss": loss, **terms, "grad_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, lora, optimizer_state), report

    return jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
