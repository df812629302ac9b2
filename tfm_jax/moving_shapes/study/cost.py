"""Measures the time of a training step of each arm, in turns, so that other load on the machine affects all alike."""

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
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.sharding import make_mesh
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.train.run import TrainRun
from tfm_jax.train.step import init_state, make_step
from tfm_jax.wan import load_base

Seconds = Mapping[str, Sequence[float]]
"""Arm -> seconds per step, one number per round."""


def measure_cost(run: TrainRun, objectives: Mapping[str, ObjectiveConfig], rounds: int) -> dict[str, list[float]]:
    """In every round, time one training step of `run` with each objective, in random order; return the seconds."""
    mesh = make_mesh(run.mesh)
    model = load_base(run.model, mesh)
    attach_lora(model, run.lora)
    init_lora(model, jax.random.key(run.train.seed), mesh)
    graph, lora, frozen = split_lora(model)
    records = open_records(run.data.path)
    optimizer = make_optimizer(run.optimizer, run.train.number_of_steps(len(records)))
    batch, _ = Batches(records, run.train.batch_size, run.train.seed, mesh, model.config.text_len).read(0)
    with jax.set_mesh(mesh):

        def make_timed(objective: ObjectiveConfig) -> Callable[[], None]:
            state, placement = init_state(jax.tree.map(jnp.copy, lora), optimizer, mesh)
            step = make_step(graph, optimizer, objective, run.train.seed, placement, run.train.remat)

            def run_step() -> None:
                nonlocal state
                state, report = step(state, frozen, batch)
                jax.block_until_ready((state, report))

            return run_step

        steps = {name: make_timed(objective) for name, objective in objectives.items()}
        for run_step in steps.values():  # compiles and warms up
            run_step()
            run_step()
        seconds = {name: [] for name in steps}
        rng = np.random.default_rng(0)
        for _ in range(rounds):
            for name in rng.permutation(list(steps)):
                start = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def relative_costs(seconds: Seconds, arm: str) -> tuple[float, float, float]:
    """Return the quartiles, over the rounds, of the ratio of an arm's cost to the baseline's: (median, low, high)."""
    low, median, high = np.quantile(np.divide(seconds[arm], seconds[protocol.BASELINE]), (0.25, 0.5, 0.75))
    return float(median), float(low), float(high)


def latest_costs(results: Results) -> dict[str, list[float]]:
    """Map each arm to the seconds per step in each round of the last measurement.

    Costs from different measurements cannot be compared.
    """
    measured = results.all("cost")
    return measured[-1]["seconds"] if measured else {}
