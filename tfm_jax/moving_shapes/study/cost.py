"""What a training step of each arm costs, measured in turns so that whatever else the machine does meets all alike."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.config import ObjectiveConfig
from tfm_jax.data.batches import Batches
from tfm_jax.data.records import open_records
from tfm_jax.lora.adapters import attach_lora, init_lora, split_lora
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.statistics import Estimate, bootstrap
from tfm_jax.sharding import make_mesh
from tfm_jax.train.loop import TrainRun
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.train.step import init_state, make_step
from tfm_jax.wan import load_base

Seconds = Mapping[str, Sequence[float]]
"""Arm -> seconds of its step in each round."""


def measure_cost(run: TrainRun, objectives: Mapping[str, ObjectiveConfig], rounds: int) -> dict[str, list[float]]:
    """Seconds of the training step of `run` with each objective, in `rounds` rounds of all of them in random order."""
    mesh = make_mesh(run.mesh)
    model = load_base(run.model, mesh)
    attach_lora(model, run.lora)
    init_lora(model, jax.random.key(run.train.seed), mesh)
    graph, lora, frozen = split_lora(model)
    optimizer = make_optimizer(run.optimizer)
    batch, _ = Batches(open_records(run.data.path), run.train.batch_size, run.train.seed, mesh).read(0)
    with jax.set_mesh(mesh):

        def stepper(objective: ObjectiveConfig) -> Callable[[], None]:
            state, placement = init_state(jax.tree.map(jnp.copy, lora), optimizer, mesh)
            step = make_step(graph, optimizer, objective, run.train.seed, placement, run.train.remat)

            def go() -> None:
                nonlocal state
                state, report = step(state, frozen, batch)
                jax.block_until_ready((state, report))

            return go

        steps = {name: stepper(objective) for name, objective in objectives.items()}
        for go in steps.values():  # compiles
            go()
            go()
        seconds = {name: [] for name in steps}
        rng = np.random.default_rng(0)
        for _ in range(rounds):
            for name in rng.permutation(list(steps)):
                start = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def relative(seconds: Seconds, arm: str) -> Estimate:
    """Median over the rounds of an arm's cost over the baseline's, with its interval."""
    return bootstrap(np.divide(seconds[arm], seconds[protocol.BASELINE]), np.median)


def steps_in_the_same_time(seconds: Seconds, arm: str, steps: int) -> int:
    """How many steps the arm makes in the time of `steps` steps of the baseline; `steps` where costs count as equal."""
    ratio = relative(seconds, arm)
    if abs(ratio.value - 1) < protocol.SAME_TIME or ratio.low <= 1 <= ratio.high:
        return steps
    return max(1, round(steps / ratio.value))
