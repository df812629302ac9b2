"""Writes the sections of docs/study.md on what the results show and what they do not show."""

from tfm_jax.moving_shapes.evaluation.set_metrics import TITLES
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.findings import Findings, sign
from tfm_jax.moving_shapes.study.formats import enumerate_words, format_interval
from tfm_jax.moving_shapes.study.statistics import interval_coverage

GUARDED = (*protocol.PRIMARY, *protocol.GUARDS)


def conclusions(found: Findings) -> str:
    """Return the section with the verdict and the differences behind it."""
    lines = [_verdict(found)]
    lines += [_sentence(found, protocol.TREATMENT, protocol.BASELINE, metric) for metric in GUARDED]
    lines += [_sentence(found, protocol.BASELINE, protocol.BASE, metric) for metric in protocol.PRIMARY]
    lines += [line for metric in protocol.PRIMARY if (line := _seed_noise(found, metric))]
    lines.append(_chance(found))
    return "## What the results show\n\n" + "\n".join(f"- {line}" for line in lines if line)


def _verdict(found: Findings) -> str:
    """Return the decision that follows from RULE."""
    if protocol.TREATMENT not in found.arms:
        return f"`{protocol.TREATMENT}` was not run, so the question of the study remains open."
    signs = {m: sign(found.difference(protocol.TREATMENT, protocol.BASELINE, m), m) for m in GUARDED}
    best, worst = (all(signs[m] == s for m in protocol.PRIMARY) for s in (1, -1))
    kept = all(signs[m] != -1 for m in protocol.GUARDS)
    question = f"Does `{protocol.TREATMENT}` move better than `{protocol.BASELINE}` at equal steps, by the rule above?"
    if None in signs.values():
        return f"**{question} Not decided**: a metric has no finite number in some run."
    if best and kept:
        return f"**{question} Yes**, on this model and these clips."
    if best:
        return f"**{question} No**: both deciding metrics are better, but a metric that must not get worse is worse."
    if worst:
        return f"**{question} No, it moves worse.**"
    if all(signs[m] == 0 for m in protocol.PRIMARY):
        return f"**{question} No difference is detected** at this size."
    return f"**{question} No**: it is not better on both deciding metrics."


def _sentence(found: Findings, arm: str, other: str, metric: str) -> str:
    names = f"`{arm}` less `{other}`, {TITLES[metric]}"
    difference = found.difference(arm, other, metric)
    if difference is None:
        return f"{names}: cannot be compared."
    largest = max(abs(difference.low), abs(difference.high))
    result = {
        1: "better",
        -1: "worse",
        0: f"no difference detected; differences larger than {largest:.3g} are outside the interval",
    }[sign(difference, metric) or 0]
    return f"{names}: {format_interval(difference)}, {result}."


def _seed_noise(found: Findings, metric: str) -> str:
    """Compare the spread of the baseline over its seeds with the difference between treatment and baseline."""
    numbers = [value for value in found.by_seed(protocol.BASELINE, metric).values() if value is not None]
    difference = found.difference(protocol.TREATMENT, protocol.BASELINE, metric)
    if len(numbers) < 2 or difference is None:
        return ""
    return (
        f"{TITLES[metric]}: two seeds of `{protocol.BASELINE}` differ by up to {max(numbers) - min(numbers):.3g}; the "
        f"means of `{protocol.TREATMENT}` and `{protocol.BASELINE}` differ by {abs(difference.value):.3g}."
    )


def _chance(found: Findings) -> str:
    """Compare the number of detected differences with the number that chance alone would give."""
    arms = [arm for arm in found.arms if arm != protocol.BASELINE]
    intervals = [found.difference(arm, protocol.BASELINE, m) for arm in arms for m in protocol.PRIMARY]
    measured = [estimate for estimate in intervals if estimate]
    detected = sum(estimate.excludes_zero for estimate in measured)
    covered = interval_coverage(found.study.size.seeds)
    return (
        f"The table of differences has {len(measured)} intervals for the deciding metrics, not counting "
        f"`{protocol.BASE}`; {detected} of them exclude 0. Such an interval over {found.study.size.seeds} normally "
        f"distributed numbers contains their true mean in {covered:.0%} of cases, so about "
        f"{(1 - covered) * len(measured):.1f} would exclude 0 even if no arm differed from `{protocol.BASELINE}`."
    )


def limits(found: Findings) -> str:
    """Return the section on what the study cannot show, whatever its results."""
    run, size = found.study.run, found.study.size
    return f"""## What the results do not show

- Anything about Wan2.1 at 1.3B or 14B, real videos, or motions other than {enumerate_words(size.laws)}: the model has
  {run.model.layers} layers of width {run.model.dim}, and a clip has {run.clip.latent_size[0]} latent frames.
- Anything about longer training, or another learning rate or rank: these are the same for all arms.
- That there is no difference if none is detected. The interval only bounds the difference, and with few seeds the
  intervals are too short.
- How good the samples look: the metrics measure positions, sizes, shapes, colours and changes of pixels."""
