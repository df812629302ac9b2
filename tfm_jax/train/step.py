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
from jaxtyping import Array, Bool, Float, Int, Shaped

from tfm_jax.arrays import PerVideo, Scalar
from tfm_jax.config import ObjectiveConfig, Remat
from tfm_jax.data.batches import Batch
from tfm_jax.objective import Draws, draw, objective_loss
from tfm_jax.sharding import compiler_options, constrain, shardings
from tfm_jax.train.optimizer import last_learning_rate


class TrainState(NamedTuple):
    """Everything that changes during a run."""

    step: Int[Array, ""]
    bad_steps: Int[Array, ""]
    """Number of steps skipped in a row, up to and including the last step; 0 if the last step was not skipped."""
    lora: nnx.State
    optimizer: Any
    ema: nnx.State | None = None
    """Exponential moving average of the adapters, if the run keeps one."""


LEVEL_BINS = 10
"""Number of equal bins of the noise level, from 0 to 1, over which the loss is reported."""

Report = dict[str, Shaped[Array, "..."]]
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


def init_state(
    lora: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh, ema: bool = False
) -> tuple[TrainState, TrainState]:
    """Return the state before the first step, and its sharding. The optimizer's moments are split like the adapters.

    With `ema`, the state has an average of the adapters, too.
    """

    def init(lora: nnx.State) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        # The average needs buffers of its own, because those of the adapters are donated to the first step.
        return TrainState(zero, zero, lora, optimizer.init(lora), jax.tree.map(jnp.copy, lora) if ema else None)

    state_sharding = shardings(jax.eval_shape(init, lora), mesh)
    return jax.jit(init, out_shardings=state_sharding)(lora), state_sharding


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveConfig,
    seed: int,
    state_sharding: TrainState,
    remat: Remat = "full",
    accumulate: int = 1,
    ema_decay: float | None = None,
) -> Step:
    """Return the jitted step (state, frozen weights, batch) -> (new state, report), which donates the old state.

    The noise and the noise levels depend only on the seed and the index of the step, so a resumed run draws the same.

    If the loss, one of its terms, the gradient norm, an updated adapter or the updated optimizer state is not finite,
    the adapters, their average and the optimizer state stay unchanged. The report contains loss, its terms, grad_norm,
    learning_rate, update_norm (of the update before it may be skipped), loss_by_level and the new state's bad_steps.
    loss_by_level is the mean loss of the videos in each of the `LEVEL_BINS`, without weights, and NaN for empty bins.

    Args:
        graphdef: graph definition of the transformer with its adapters.
        state_sharding: sharding of every part of the state, from `init_state`.
        remat: which activations are saved for the backward pass; see `TrainConfig.remat`.
        accumulate: number of parts in which the batch is computed, one after the other. It must divide the batch.
        ema_decay: decay of the average in the state; None if the state has none.
    """
    key = run_keys(seed).steps

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, Report]:
        def loss_of(lora: nnx.State, part: tuple[Batch, Draws]) -> tuple[Scalar, tuple[dict[str, Scalar], Array]]:
            velocity = nnx.merge(graphdef, lora, frozen)
            velocity.remat = remat
            (latents, text), draws = part
            clean, text = jnp.asarray(latents, jnp.float32), jnp.asarray(text, jnp.float32)
            loss, terms, losses = objective_loss(velocity, clean, text, draws, objective)
            return loss, (terms, _sums_by_level(losses, draws.sigma))

        draws = draw(jax.random.fold_in(key, state.step), batch.latents.shape, objective)
        gradient_of = _accumulated(jax.value_and_grad(loss_of, has_aux=True), accumulate, state_sharding.lora)
        (loss, (terms, (sums, counts))), gradient = gradient_of(state.lora, (batch, draws))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.lora)
        report: Report = {"loss": loss, **terms, "grad_norm": optax.tree.norm(gradient)}
        lora: Any = optax.apply_updates(state.lora, updates)
        ema = None if ema_decay is None else _moving_average(state.ema, lora, ema_decay, state.step)
        before, after = (state.lora, state.optimizer, state.ema), (lora, optimizer_state, ema)
        good = _all_finite((report, after))
        lora, kept, ema = jax.tree.map(lambda x, y: jnp.where(good, x, y), after, before)
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        report |= {"learning_rate": last_learning_rate(optimizer_state), "update_norm": optax.tree.norm(updates)}
        report |= {"loss_by_level": constrain(sums / counts, (None,)), "bad_steps": bad_steps}
        return TrainState(state.step + 1, bad_steps, lora, kept, ema), report

    sharding: Any = state_sharding.step
    options = compiler_options(sharding.mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, None), compiler_options=options)


def _accumulated(function: Callable[..., Any], parts: int, lora_sharding: Any) -> Callable[..., Any]:
    """Return `function`(lora, batch) -> (loss and terms, gradient), computed as the mean over equal parts of the batch.

    Each device gets an equal share of the rows of every part, from the rows that it holds anyway.
    """
    if parts == 1:
        return function

    def split(x: Array) -> Array:
        # Rows n, n + parts, ... form part n.
        by_part = jnp.swapaxes(jnp.reshape(x, (-1, parts, *x.shape[1:])), 0, 1)
        return constrain(by_part, (None, "batch", *(None,) * (x.ndim - 1)))

    def mean(lora: nnx.State, batch: Any) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            values, gradient = jax.tree.map(jnp.add, total, function(lora, part))
            return (values, jax.lax.with_sharding_constraint(gradient, lora_sharding)), None

        batches = jax.tree.map(split, batch)
        shapes = jax.eval_shape(function, lora, jax.tree.map(lambda x: x[0], batches))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, batches)
        return jax.tree.map(lambda x: x / parts, total)

    return mean


def _sums_by_level(losses: PerVideo, sigma: PerVideo) -> Float[Array, "2 bins"]:
    """Return, for each bin of noise levels, the sum of the losses of its videos and the number of these videos."""
    bins = jax.nn.one_hot(jnp.minimum(LEVEL_BINS * sigma, LEVEL_BINS - 1).astype(jnp.int32), LEVEL_BINS)
    # `where`, because a loss that is not finite must not reach the bins of other videos.
    return jnp.stack([jnp.where(bins > 0, losses[:, None], 0).sum(axis=0), bins.sum(axis=0)])


def _moving_average(average: Any, value: Any, decay: float, step: Int[Array, ""]) -> Any:
    """Return the exponential moving average after the update of `step`, counted from 0.

    The decay rises from 1/10 to `decay`, as in `tf.train.ExponentialMovingAverage` with `num_updates`.
    """
    count = step.astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda x, y: decay_now * x + (1 - decay_now) * y, average, value)


def _all_finite(tree: Any) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
