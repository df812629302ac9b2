"""Foresees, from the pilot, the smallest difference that the study can detect."""

import math
from typing import Any

from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.plan import Study
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.moving_shapes.study.statistics import corrected_level, pooled_spread, smallest_detectable


def family_size(study: Study) -> int:
    """Return the number of comparisons in the confirmatory family."""
    return len(protocol.PRIMARY) * len(study.size.lengths) * len(study.size.laws)


def foresee(study: Study, pilot: Results) -> list[dict[str, Any]]:
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
                    spread = math.sqrt(2) * pooled_spread(list(groups.values()))
                    smallest = smallest_detectable(spread, study.size.seeds, level)
                    mean = _mean(groups.get(study.size.learning_rate))
                    found.append({"law": law, "steps": steps, "metric": metric, "spread": spread,
                                  "smallest": smallest, "mean": mean})  # fmt: skip
    return found


def _by_rate(runs: list[dict[str, Any]], metric: str) -> dict[float, list[float]]:
    """Map each learning rate with at least two seeds to its finite values."""
    groups: dict[float, list[float]] = {}
    for run in runs:
        value = run.get("metrics", {}).get(metric)
        if value is not None:
            groups.setdefault(run["learning_rate"], []).append(value)
    return {rate: values for rate, values in groups.items() if len(values) > 1}


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
