"""The training step, one jitted function that computes the loss of a batch and its gradient, and updates the adapters.

A step with a value that is not finite is bad. The devices skip it without waiting for the host: only counters change.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Shaped

from tfm_jax.arrays import Scalar
from tfm_jax.config import ObjectiveConfig, Remat
from tfm_jax.data.batches import Batch
from tfm_jax.objective import objective_loss
from tfm_jax.sharding import shardings
from tfm_jax.train.optimizer import last_learning_rate


class TrainState(NamedTuple):
    """Everything that changes during a run."""

    step: Int[Array, ""]
    bad_steps: Int[Array, ""]
    """Number of steps skipped in a row, up to and including the last step; 0 if the last step was not skipped."""
    lora: nnx.State
    optimizer: Any


Report = dict[str, Shaped[Array, ""]]
Step = Callable[[TrainState, nnx.State, Batch], tuple[TrainState, Report]]


class RunKeys(NamedTuple):
    """The independent random keys of a run."""

    adapters: jax.Array
    """For the initial adapters."""
    steps: jax.Array
    """For the noise and noise levels. The key of a step is folded from this key and the index of the step."""


def run_keys(seed: int) -> RunKeys:
    """Return the random keys of a run with this seed."""
    return RunKeys(*jax.random.split(jax.random.key(seed)))


def init_state(lora: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """Return the state before the first step, and its sharding. The optimizer's moments are split like the adapters."""

    def init(lora: nnx.State) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, lora, optimizer.init(lora))

    state_sharding = shardings(jax.eval_shape(init, lora), mesh)
    return jax.jit(init, out_shardings=state_sharding)(lora), state_sharding


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveConfig,
    seed: int,
    state_sharding: TrainState,
    remat: Remat = "full",
) -> Step:
    """Return the jitted step (state, frozen weights, batch) -> (new state, report), which donates the old state.

    The noise and the noise levels depend only on the seed and the index of the step, so a resumed run draws the same.

    If the loss, one of its terms, the gradient norm, an updated adapter or the updated optimizer state is not finite,
    the adapters and the optimizer state stay unchanged. The report contains loss, its terms, grad_norm, learning_rate
    and the new state's bad_steps.

    Args:
        graphdef: graph definition of the transformer with its adapters.
        state_sharding: sharding of every part of the state, from `init_state`.
        remat: which activations are saved for the backward pass; see `TrainConfig.remat`.
    """
    key = run_keys(seed).steps

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, Report]:
        def loss_of(lora: nnx.State) -> tuple[Scalar, dict[str, Scalar]]:
            velocity = nnx.merge(graphdef, lora, frozen)
            velocity.remat = remat
            step_key = jax.random.fold_in(key, state.step)
            clean, text = (jnp.asarray(values, jnp.float32) for values in batch)
            return objective_loss(velocity, clean, text, step_key, objective)

        (loss, terms), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.lora)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.lora)
        report: Report = {"loss": loss, **terms, "grad_norm": optax.tree.norm(gradient)}
        updated: Any = (optax.apply_updates(state.lora, updates), optimizer_state)
        good = _all_finite((report, updated))
        lora, kept = jax.tree.map(lambda x, y: jnp.where(good, x, y), updated, (state.lora, state.optimizer))
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        report |= {"learning_rate": last_learning_rate(optimizer_state), "bad_steps": bad_steps}
        return TrainState(state.step + 1, bad_steps, lora, kept), report

    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, None))


def _all_finite(tree: Any) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
