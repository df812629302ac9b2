"""Foresees, from the pilot, the smallest difference that the study can detect."""

import math

from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.plan import Study
from tfm_jax.moving_shapes.study.results import Record, Results
from tfm_jax.moving_shapes.study.statistics import corrected_level, pooled_spread, smallest_detectable


def family_size(study: Study) -> int:
    """Return the number of comparisons in the confirmatory family."""
    return len(protocol.PRIMARY) * len(study.size.lengths) * len(study.size.laws)


def foresee(study: Study, pilot: Results) -> list[Record]:
    """Return, for each comparison of the family that the pilot covers, the smallest detectable difference.

    The pilot has runs of plain flow matching only. The spread of paired differences between two arms is taken to be
    that between two such runs with different seeds: sqrt(2) times their standard deviation, pooled over the learning
    rates. Arms that share a seed also share prompts and noise, so that their differences should vary less.
    """
    level = corrected_level(family_size(study))
    found = []
    for law in study.size.laws:
        for steps in study.size.lengths:
            runs = pilot.all("run", law=law, arm=protocol.BASELINE, steps=steps)
            for metric in protocol.PRIMARY:
                groups = _by_rate(runs, metric)
                if groups:
                    spread = math.sqrt(2) * pooled_spread(groups)
                    smallest = smallest_detectable(spread, study.size.seeds, level)
                    found.append({"law": law, "steps": steps, "metric": metric, "spread": spread, "smallest": smallest})
    return found


def _by_rate(runs: list[Record], metric: str) -> list[list[float]]:
    """Return the finite values of each learning rate that has at least two."""
    groups: dict[float, list[float]] = {}
    for run in runs:
        value = run.get("metrics", {}).get(metric)
        if value is not None:
            groups.setdefault(run["learning_rate"], []).append(value)
    return [values for values in groups.values() if len(values) > 1]
