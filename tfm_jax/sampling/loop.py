"""Guidance, and the loop over the steps of a solver."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int

from tfm_jax.arrays import Latents, Scalar, Text
from tfm_jax.config import Solver
from tfm_jax.objective import timestep
from tfm_jax.sampling.solvers import State, Steps, begin, make_steps, take_step
from tfm_jax.sharding import constrain
from tfm_jax.wan.transformer import WanTransformer

PAIRS = "two b l d -> (b two) l d"


@partial(jax.jit, static_argnames="guidance")
def guided_velocity(
    transformer: WanTransformer, x: Latents, sigma: Scalar, text: Text, negative: Text, *, guidance: float
) -> Latents:
    """Return the velocity `v(negative) + guidance (v(text) - v(negative))`. If guidance is 1, compute only v(text).

    Under `jax.set_mesh`, the result is sharded along the batch axis.
    """
    time = timestep(jnp.broadcast_to(sigma, x.shape[:1]))
    if guidance == 1:
        return constrain(transformer(x, time, text), ("batch",))
    # The two rows of each video are adjacent, so that both are on the same device.
    both = transformer(jnp.repeat(x, 2, axis=0), jnp.repeat(time, 2), rearrange([text, negative], PAIRS))
    with_text, without = rearrange(both, "(b two) f h w c -> two b f h w c", two=2)
    return constrain(without + guidance * (with_text - without), ("batch",))


@partial(jax.jit, static_argnames=("guidance", "interval"))
def _solve(
    transformer: WanTransformer,
    state: State,
    text: Text,
    negative: Text,
    steps: Steps,
    end: Int[Array, ""],
    *,
    guidance: float,
    interval: tuple[float, ...],
) -> State:
    """Take the steps before number `end`. The program is the same for every `end`."""
    first, last = (round(edge * len(steps.sigma)) for edge in interval)

    def velocity(x: Latents, sigma: Scalar, number: Int[Array, ""]) -> Latents:
        def guided(scale: float) -> Latents:
            return guided_velocity(transformer, x, sigma, text, negative, guidance=scale)

        if guidance == 1 or interval == (0, 1):
            return guided(guidance)
        inside = (first <= number) & (number < last)
        return jax.lax.cond(inside, lambda: guided(guidance), lambda: guided(1.0))

    return jax.lax.while_loop(lambda state: state.number < end, lambda state: take_step(velocity, steps, state), state)


def sample_latents(
    transformer: WanTransformer,
    noise: Latents,
    text: Text,
    negative: Text,
    *,
    solver: Solver = "euler",
    steps: int = 50,
    shift: float = 5.0,
    guidance: float = 5.0,
    guidance_interval: tuple[float, ...] = (0.0, 1.0),
    until: int | None = None,
    on_step: Callable[[], None] | None = None,
) -> Latents:
    """Sample latents of videos, guided towards `text` and away from `negative`.

    All steps are one compiled program. With `on_step`, it runs for one step at a time.

    Args:
        guidance_interval: the part of the steps that is guided, as two fractions.
        until: stop after this number of steps; None takes all.
        on_step: called after each step. An exception that it raises stops the sampling.
    """
    table = make_steps(solver, steps, shift)
    state = begin(noise.astype(jnp.float32))
    end = steps if until is None else until
    for number in range(1, end + 1) if on_step else [end]:
        state = _solve(
            transformer, state, text, negative, table, np.int32(number), guidance=guidance, interval=guidance_interval
        )
        if on_step:
            state.x.block_until_ready()
            on_step()
    return state.x
