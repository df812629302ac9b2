"""Writes the section of docs/study.md on the pilot, in which steps and learning rate were chosen."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tfm_jax.markdown import table
from tfm_jax.moving_shapes.evaluation.set_metrics import TITLES
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.findings import GUARDED
from tfm_jax.moving_shapes.study.formats import enumerate_words, titles_with_arrows
from tfm_jax.moving_shapes.study.plan import Study
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.numbers import format_number


def pilot_section(study: Study, pilot: Results) -> str:
    """Return the section: the table of the pilot, and whether it supports the choice of the study."""
    heading = "## The pilot"
    if not pilot.all("run"):
        return f"{heading}\n\nThere are no results of a pilot, so nothing supports the choice of the learning rate."
    parts = [
        heading,
        f"Steps and learning rate were chosen with `{protocol.BASELINE}` alone, with {len(protocol.PILOT_SEEDS)} seeds "
        "that the study does not use, and the same clips and prompts. The table shows means over these seeds; the "
        "last column says whether the deciding metrics of every seed are better than those of the base model with the "
        "same seed.",
        pilot_table(study, pilot),
        *(_choice(study, pilot, law) for law in study.size.laws),
    ]
    return "\n\n".join(parts)


def pilot_table(study: Study, pilot: Results) -> str:
    """Tabulate the metrics of the base model and of every learning rate and length."""
    rows = []
    for law in study.size.laws:
        for rate, steps in _variants(pilot, law):
            metrics = [_format_mean(_values(pilot, law, rate, steps, metric)) for metric in GUARDED]
            better = "" if steps == 0 else "yes" if _beats_base(pilot, law, rate, steps) else "no"
            names = [f"`{protocol.BASE}`", ""] if steps == 0 else [f"{rate:g}", str(steps)]
            rows.append([law, *names, *metrics, better])
    return table(["law", "learning rate", "steps", *titles_with_arrows(GUARDED), "better than the base"], rows)


def _variants(pilot: Results, law: str) -> list[tuple[float, int]]:
    """Return the (learning rate, steps) that the pilot has measured on a law; the base model has 0 steps."""
    return sorted({(run["learning_rate"], run["steps"]) for run in pilot.all("run", law=law)})


def _values(pilot: Results, law: str, rate: float, steps: int, metric: str) -> dict[int, float | None]:
    runs = pilot.all("run", law=law, learning_rate=rate, steps=steps)
    return {run["seed"]: run.get("metrics", {}).get(metric) for run in runs}


def _format_mean(values: dict[int, float | None]) -> str:
    numbers = list(values.values())
    return format_number(None if None in numbers else float(np.mean([n for n in numbers if n is not None])))


def _beats_base(pilot: Results, law: str, rate: float, steps: int) -> bool:
    """Whether every seed is better than the base model on every deciding metric, all of which are better if lower."""
    for metric in protocol.PRIMARY:
        after, before = _values(pilot, law, rate, steps, metric), _values(pilot, law, 0.0, 0, metric)
        pairs = [(after.get(seed), before[seed]) for seed in before]
        if not pairs or any(one is None or (other is not None and one >= other) for one, other in pairs):
            return False
    return True


def _choice(study: Study, pilot: Results, law: str) -> str:
    """Say whether the pilot supports the learning rate and the longest training of the study."""
    rate, last = study.size.learning_rate, study.size.lengths[-1]
    measured = [steps for tried, steps in _variants(pilot, law) if tried == rate]
    start = f"On *{law}*, the study uses a learning rate of {rate:g} and up to {last} steps:"
    if last not in measured:
        return f"{start} the pilot did not measure these."
    better = "better" if _beats_base(pilot, law, rate, last) else "**not** better"
    text = f"{start} the fine-tuned model is {better} than the base model on both deciding metrics with every seed."
    changes = [_change(pilot, law, rate, pair) for pair in pairwise(measured) if last in pair]
    return f"{text} {changes[-1]}" if changes else text  # to the next longer training, if there is one


def _change(pilot: Results, law: str, rate: float, steps: Sequence[int]) -> str:
    """Say how the deciding metrics change between two lengths."""
    parts = []
    for metric in protocol.PRIMARY:
        before, after = (list(_values(pilot, law, rate, n, metric).values()) for n in steps)
        if None in before or None in after:
            parts.append(f"{TITLES[metric]} cannot be compared")
        else:
            change = np.mean([n for n in after if n is not None]) / np.mean([n for n in before if n is not None]) - 1
            parts.append(f"{TITLES[metric]} changes by {change:+.0%}")
    return f"From {steps[0]} to {steps[1]} steps, {enumerate_words(parts)}."
