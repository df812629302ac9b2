"""Writes the sections of docs/study.md that are mostly tables of results."""

from collections.abc import Mapping, Sequence

import numpy as np

from tfm_jax.markdown import table
from tfm_jax.moving_shapes.evaluation.set_metrics import TITLES
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.cost import latest_costs, relative_costs
from tfm_jax.moving_shapes.study.findings import GUARDED, Cell, Findings
from tfm_jax.moving_shapes.study.formats import enumerate_words, format_interval, format_spread, titles_with_arrows
from tfm_jax.moving_shapes.study.statistics import Estimate, paired_difference
from tfm_jax.numbers import format_number

TFM, FM = f"`{protocol.TREATMENT}`", f"`{protocol.BASELINE}`"


# --- The confirmatory family -----------------------------------------------------------------------------------------


def confirmatory(found: Findings) -> str:
    """Tabulate the confirmatory family, with the smallest detectable differences that were stated before the runs."""
    if protocol.TREATMENT not in found.study.size.arms:
        return f"## {TFM} less {FM}: confirmatory\n\n{TFM} was not run."
    foreseen = {
        (each["law"], each["steps"], each["metric"]): each for each in found.results.one("power").get("differences", [])
    }
    rows = []
    for cell in found.cells:
        for metric in protocol.PRIMARY:
            each = foreseen.get((cell.law, cell.steps, metric), {})
            difference = found.difference(cell, protocol.TREATMENT, protocol.BASELINE, metric)
            rows.append([
                cell.law, str(cell.steps), titles_with_arrows([metric])[0],
                format_number(found.mean(cell, protocol.BASELINE, metric)), format_interval(difference),
                _half_width(difference), format_number(each.get("smallest")),
            ])  # fmt: skip
    columns = ["law", "steps", "metric", f"mean of {FM}", "difference", "half the interval", "smallest detectable"]
    return f"""## {TFM} less {FM}: confirmatory

The mean of the paired differences and its interval at {found.corrected:.2%}; in bold if the interval excludes 0.
{_foreseen(found, bool(foreseen))}

{table(columns, rows)}"""


def _half_width(difference: Estimate | None) -> str:
    return format_number(None if difference is None else (difference.high - difference.low) / 2)


def _foreseen(found: Findings, stated: bool) -> str:
    if not stated:
        return (
            "When the study started, there was no pilot with these lengths, so no smallest detectable difference was "
            "stated."
        )
    return (
        "The smallest detectable difference was computed from the pilot before the first run: it is the true "
        f"difference that {found.study.size.seeds} seeds detect with a probability of {protocol.POWER:.0%}. It takes "
        f"the spread of the differences to be that between two runs of {FM} with different seeds, pooled over the "
        "learning rates of the pilot. This is rough, because the pilot has few seeds; and arms that share a seed also "
        "share prompts and noise, so the true spread may be smaller. The half width of the interval shows the spread "
        "that was found."
    )


# --- One law ---------------------------------------------------------------------------------------------------------


def law_section(found: Findings, law: str) -> str:
    """Tabulate all metrics of every arm on a law, and the exploratory differences."""
    parts = [f"## Law of motion: {law}", _notes(found, law)]
    for steps in found.study.size.lengths:
        parts += [f"**After {steps} steps: mean ± standard deviation over the seeds**"]
        parts += [_levels(found, Cell(law, steps), GUARDED)]
    parts += [_levels(found, Cell(law, found.last), protocol.SECONDARY), *_diverged(found, law)]
    parts += [
        f"**Exploratory: arm less {FM}**\n\nPaired by seed: mean and {protocol.CONFIDENCE:.0%} interval without "
        f"correction, in bold if it excludes 0. The deciding metrics of {TFM} have the corrected intervals of the "
        "confirmatory family."
    ]
    for steps in found.study.size.lengths:
        parts.append(_differences(found, Cell(law, steps), GUARDED))
    parts.append(_differences(found, Cell(law, found.last), protocol.SECONDARY))
    parts.append(_contrasts(found, Cell(law, found.last)))
    return "\n\n".join(parts)


def _notes(found: Findings, law: str) -> str:
    real = found.results.one("real", law=law)
    if not real:
        return "The real clips have not been measured yet."
    return (
        f"The floor is the mean difference between two random sets of {real['compared']} real clips, as many as each "
        "side of a comparison has; smaller differences show nothing about motion. A dash marks a number that does not "
        "exist, such as the distance of a set from itself, or that is infinite, such as the residual if at least half "
        "of the clips lose an object."
    )


def _levels(found: Findings, cell: Cell, metrics: Sequence[str]) -> str:
    """Tabulate the means over the seeds, with real clips in the first rows and the floor in the last."""
    real = found.results.one("real", law=cell.law)
    names = {"reference": "real clips", "generated": "real, through the autoencoder", "floor": "floor"}
    known = {
        side: [name, *(format_number(real[side][metric]) for metric in metrics)] for side, name in names.items() if real
    }
    rows = [known[side] for side in ("reference", "generated") if real]
    for arm in (protocol.BASE, *found.study.arms(cell.law)):
        rows.append([f"`{arm}`", *(format_spread(found.by_seed(cell, arm, metric)) for metric in metrics)])
    rows += [known["floor"]] if real else []
    return table([f"{cell.steps} steps", *(TITLES[metric] for metric in metrics)], rows)


def _diverged(found: Findings, law: str) -> list[str]:
    runs = [run for run in found.results.all("run", law=law) if "diverged" in run]
    texts = [f"`{run['arm']}` with seed {run['seed']} before step {run['steps']} ({run['diverged']})" for run in runs]
    return [f"Diverged: {enumerate_words(texts)}."] if texts else []


def _differences(found: Findings, cell: Cell, metrics: Sequence[str]) -> str:
    others = [protocol.BASE, *(arm for arm in found.study.arms(cell.law) if arm != protocol.BASELINE)]
    rows = [
        [f"`{arm}`", *(format_interval(found.difference(cell, arm, protocol.BASELINE, m)) for m in metrics)]
        for arm in others
    ]
    return table([f"{cell.steps} steps", *titles_with_arrows(metrics)], rows)


def _contrasts(found: Findings, cell: Cell) -> str:
    columns = [f"{cell.steps} steps", "the arms differ in", *titles_with_arrows(protocol.PRIMARY)]
    rows = [
        [f"`{a}` less `{b}`", about, *(format_interval(found.difference(cell, a, b, m)) for m in protocol.PRIMARY)]
        for a, b, about in protocol.CONTRASTS
        if {a, b} <= set(found.study.arms(cell.law))
    ]
    return f"**Where a difference comes from (exploratory)**\n\n{table(columns, rows)}"


# --- Cost ------------------------------------------------------------------------------------------------------------


def costs(found: Findings) -> str:
    """Tabulate the cost of a step, and say whether equal steps are also equal time."""
    heading, seconds = "## Cost of a step", latest_costs(found.results)
    if not seconds:
        return f"{heading}\n\nNot measured yet."
    ratios = {arm: relative_costs(seconds, arm) for arm in seconds}
    rows = [
        [f"`{arm}`", f"{1000 * np.median(seconds[arm]):.0f} ms", f"{ratio:.3f} ({low:.3f} to {high:.3f})"]
        for arm, (ratio, low, high) in ratios.items()
    ]
    unequal = [
        f"`{arm}` ({ratio - 1:+.0%})"
        for arm, (ratio, *_) in ratios.items()
        if abs(ratio - 1) >= protocol.COST_TOLERANCE
    ]
    verdict = "All costs are equal within this tolerance, so equal steps are also equal time."
    if unequal:
        verdict = (
            f"These arms differ by more: {enumerate_words(unequal)}. At equal time, an arm that costs more would have "
            "trained for fewer steps; the study compares equal steps only."
        )
    return f"""{heading}

In each of {len(seconds[protocol.BASELINE])} rounds, one step of every arm is timed. The table shows the median time,
and the median ratio to {FM} with its quartiles over the rounds. Costs count as equal if the median ratio differs from 1
by less than {protocol.COST_TOLERANCE:.0%}. {verdict}

{table(["", "time per step", f"ratio to {FM}"], rows)}"""


# --- Sensitivity -----------------------------------------------------------------------------------------------------


def sensitivity(found: Findings) -> str:
    """Tabulate the sensitivity to the order of frames, and its paired difference, by noise level."""
    parts = [
        f"""## Sensitivity to the order of frames

The tables show, at each noise level, the flow matching loss (mean squared error) on held-out clips with permuted latent
frames, divided by the loss on the unchanged clips, after {found.last} steps: the mean over the seeds. Loss function,
noise and permutations are the same for every arm. A ratio of 1 means that the order of frames makes no difference to
the network."""
    ]
    for law in found.study.size.laws:
        parts += [_ratios(found, law), _order_difference(found, law)]
    parts.append(
        "A larger ratio says that the network predicts frames in their true order better than permuted ones, by a "
        "larger factor: it relies more on how frames follow each other. It does not say that its videos move better, "
        "and it does not separate motion from other traits of the order; the first latent frame, for example, stands "
        "for one picture and each other one for four. Training on TFM's path and loss also changes the loss on ordered "
        f"clips, which {FM} minimises, and a larger denominator makes the ratio smaller."
    )
    return "\n\n".join(part for part in parts if part)


def _ratios(found: Findings, law: str) -> str:
    rows = []
    for arm in (protocol.BASE, *found.study.arms(law)):
        levels = [[r for r in by_seed.values() if r is not None] for by_seed in found.sensitivity(law, arm)]
        if all(levels):
            rows.append([f"`{arm}`", *(f"{np.mean(numbers):.3f}" for numbers in levels)])
    return table([law, *(f"{sigma:g}" for sigma in protocol.SIGMAS)], rows)


def _order_difference(found: Findings, law: str) -> str:
    """Compare treatment and baseline at each noise level."""
    if protocol.TREATMENT not in found.study.size.arms:
        return ""
    pairs = zip(found.sensitivity(law, protocol.TREATMENT), found.sensitivity(law, protocol.BASELINE), strict=True)
    levels = [f"{sigma:g}" for sigma in protocol.SIGMAS]
    differences = {
        level: paired_difference(one, other, protocol.CONFIDENCE)
        for level, (one, other) in zip(levels, pairs, strict=True)
    }
    return (
        f"On *{law}*, {_order_sentence(differences)} (exploratory; {protocol.CONFIDENCE:.0%} intervals without "
        "correction).\n\n"
        + table(["noise level", f"{TFM} less {FM}"], [[each, format_interval(d)] for each, d in differences.items()])
    )


def _order_sentence(differences: Mapping[str, Estimate | None]) -> str:
    """Say at which noise levels the treatment is more or less sensitive than the baseline."""
    known = {level: difference for level, difference in differences.items() if difference}
    if not known:
        return f"{TFM} and {FM} cannot be compared yet"
    sides = {
        "more": [level for level, difference in known.items() if difference.low > 0],
        "less": [level for level, difference in known.items() if difference.high < 0],
    }
    parts = [f"{word} sensitive than {FM} at {enumerate_words(each)}" for word, each in sides.items() if each]
    return f"{TFM} is {enumerate_words(parts)}" if parts else "no difference is detected at any noise level"
