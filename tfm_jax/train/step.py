"""The training step: loss of a batch -> gradient of the adapters -> new adapters. One jitted function.

A step that is not finite changes nothing but the count of steps: it is skipped on the devices, without the host.
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
    """All that changes during a run."""

    step: Int[Array, ""]
    bad_steps: Int[Array, ""]
    """How many steps in a row, up to the last one, were skipped."""
    lora: nnx.State
    optimizer: Any


Report = dict[str, Shaped[Array, ""]]
Step = Callable[[TrainState, nnx.State, Batch], tuple[TrainState, Report]]


class RunKeys(NamedTuple):
    """The random keys of a run, independent of each other."""

    adapters: jax.Array
    """For the initial adapters."""
    steps: jax.Array
    """Folded with the number of a step: for its noise and noise levels."""


def run_keys(seed: int) -> RunKeys:
    """The keys of the run with this seed."""
    return RunKeys(*jax.random.split(jax.random.key(seed)))


def init_state(lora: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The state before the first step, and its shardings: the optimizer's moments are split as the adapters are."""

    def init(lora: nnx.State) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, lora, optimizer.init(lora))

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

    Where the loss, one of its terms, the norm of the gradient, a new adapter or the new state of the optimizer is not
    finite, adapters and optimizer stay as they were. The report has loss, its terms, grad_norm, learning_rate, and
    bad_steps as in the new state: 0 unless this step was skipped.

    Args:
        graph: of the transformer with its adapters.
        placement: the sharding of every part of the state.
        remat: what the backward pass finds saved of each block, as `TrainConfig.remat`.
    """
    key = run_keys(seed).steps

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, Report]:
        def loss_of(lora: nnx.State) -> tuple[Scalar, dict[str, Scalar]]:
            velocity = nnx.merge(graph, lora, frozen)
            velocity.remat = remat
            step_key = jax.random.fold_in(key, state.step)
            clean, text = jnp.asarray(batch.latents), jnp.asarray(batch.text)
            return objective_loss(velocity, clean, text, step_key, objective)

        (loss, terms), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.lora)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.lora)
        report: Report = {"loss": loss, **terms, "grad_norm": optax.tree.norm(gradient)}
        new: Any = (optax.apply_updates(state.lora, updates), optimizer_state)
        good = _finite((report, new))
        lora, kept = jax.tree.map(lambda x, y: jnp.where(good, x, y), new, (state.lora, state.optimizer))
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        report |= {"learning_rate": last_learning_rate(optimizer_state), "bad_steps": bad_steps}
        return TrainState(state.step + 1, bad_steps, lora, kept), report

    return jax.jit(step, donate_argnums=0, out_shardings=(placement, None))


def _finite(tree: Any) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
