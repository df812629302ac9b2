"""docs/study.md, written from the file of results alone: every number and every sentence about one is filled in."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfm_jax import video
from tfm_jax.data.metadata import read_metadata
from tfm_jax.markdown import table
from tfm_jax.moving_shapes.evaluation.report import BETWEEN_SETS, OF_A_SET
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.cost import relative, steps_in_the_same_time
from tfm_jax.moving_shapes.study.pictures import draw_differences, draw_prompt
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.moving_shapes.study.runs import Study, choose_prompts, newest_costs
from tfm_jax.moving_shapes.study.statistics import Estimate, coverage, paired
from tfm_jax.prompts import read_prompts

TITLES = {name: title for name, (title, _) in (*OF_A_SET.items(), *BETWEEN_SETS.items())}
PICTURED = 4
"""Prompts of which there is a picture: the first ones."""


class Findings(NamedTuple):
    """Results, and what is looked up in them all the time."""

    study: Study
    results: Results

    @property
    def steps(self) -> int:
        return self.study.run.train.steps

    @property
    def arms(self) -> tuple[str, ...]:
        return self.study.size.arms

    def by_seed(self, arm: str, metric: str, steps: int | None = None) -> dict[int, float | None]:
        """Seed -> the metric of an arm; None where a run diverged or has no finite number."""
        steps = 0 if arm == protocol.BASE else steps or self.steps
        runs = [run for run in self.results.all("run", arm=arm, steps=steps) if run["seed"] < self.study.size.seeds]
        return {run["seed"]: run.get("metrics", {}).get(metric) for run in runs}

    def difference(self, arm: str, other: str, metric: str, steps: int | None = None) -> Estimate | None:
        """One arm less another, paired by seed."""
        return paired(self.by_seed(arm, metric, steps), self.by_seed(other, metric))


def write_report(study: Study, results: Results, docs: Path, command: str) -> Path:
    """Write `docs/study.md` and its pictures in `docs/study/`.

    Args:
        command: the command line that made the results.
    """
    found = Findings(study, results)
    pictures = docs / "study"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [
        _head(found, command),
        _protocol(found),
        _levels(found),
        _differences(found, pictures),
        _contrasts(found),
        _costs(found),
        _sensitivity(found),
        _pictures(found, pictures),
        _follows(found),
        _does_not_follow(found),
    ]
    file = docs / "study.md"
    partial = docs / ".study.md.partial"
    partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    partial.replace(file)
    return file


# --- What was done ---------------------------------------------------------------------------------------------------


def _head(found: Findings, command: str) -> str:
    arm, folder = protocol.TREATMENT, found.study.folder(protocol.TREATMENT, 0, found.steps)
    output, clip = found.study.output, found.study.run.clip
    return f"""# Flow matching and TFM on a tiny model

This page is written by the program below from `{output / "results.jsonl"}`; no number or finding in it was written by
hand. `tfm_jax/moving_shapes/study/protocol.py` defines what is compared and how it is decided. It was fixed before the
runs.

    {command}

It goes on where it was stopped, and measures nothing twice. Any one run can be repeated with the ordinary programs,
such as `{arm}` with seed 0:

    python scripts/train.py --config {folder}/config.yaml --train.output=runs/again
    python scripts/export_lora.py runs/again runs/again/lora.safetensors
    python scripts/sample.py --config {folder}/samples/config.yaml \\
        --sampling.lora=runs/again/lora.safetensors --sampling.output=runs/again/samples
    python scripts/evaluate.py runs/again/samples --reference={output}/reference --prompts={output}/prompts.txt \\
        --frames={clip.frames} --height={clip.height} --width={clip.width} --fps={clip.fps:g}"""


def _protocol(found: Findings) -> str:
    run, size = found.study.run, found.study.size
    rows = []
    for arm in found.arms:
        objective = found.study.objective(arm)
        rows.append([f"`{arm}`", protocol.ARMS[arm].about, objective.kind, f"{objective.rho:g}", f"{objective.beta:g}"])
    return f"""## What is compared

{table(["arm", "what it is", "objective.kind", "rho", "beta"], rows)}

A LoRA of rank {run.lora.rank} is trained on {size.clips} clips of one moving shape (law of motion: {_and(size.laws)})
for {found.steps} steps of {run.train.batch_size} clips, AdamW at {run.optimizer.learning_rate:g}, from the weights
`{found.results.one("settings")["weights"]}` (first digits of their SHA-256). {size.prompts} captions that no clip of
training has are sampled with {run.sampling.steps} Euler steps at guidance {run.sampling.guidance:g}, and measured
against {size.reference} real clips. Arms of one seed share initial adapters, order of clips, noise, noise levels, and
the noise that sampling starts from. There are {size.seeds} seeds.

The metrics that decide are {_and(f"*{TITLES[metric]}*" for metric in protocol.PRIMARY)};
{_and(f"*{TITLES[metric]}*" for metric in protocol.GUARDS)} must not get worse. The others decide nothing.
{protocol.RULE}"""


# --- What came out ---------------------------------------------------------------------------------------------------


def _levels(found: Findings) -> str:
    """Means over the seeds, between real clips at the top and the floor at the bottom."""
    real = found.results.one("real")
    parts = [f"## Every arm\n\nMeans over the seeds, with their standard deviation from seed to seed. {_notes(real)}"]
    for metrics in ((*protocol.PRIMARY, *protocol.GUARDS), protocol.SECONDARY):
        rows = [["real clips", *(_number(real["reference"][metric]) for metric in metrics)]]
        rows += [["real, through the autoencoder", *(_number(real["generated"][metric]) for metric in metrics)]]
        for arm in (protocol.BASE, *found.arms):
            rows.append([f"`{arm}`", *(_spread(found.by_seed(arm, metric)) for metric in metrics)])
        rows += [["floor", *(_number(real["floor"][metric]) for metric in metrics)]]
        parts.append(table(["", *(TITLES[metric] for metric in metrics)], rows))
    return "\n\n".join(parts + _diverged(found))


def _notes(real: dict) -> str:
    return (
        "The floor is what two random halves of the real clips differ by, at the number of clips of a comparison "
        f"({real['compared']}); smaller differences show nothing about motion. A dash stands for what has no finite "
        "number: distances of a set from itself, or a residual where objects are lost in most clips."
    )


def _diverged(found: Findings) -> list[str]:
    runs = [run for run in found.results.all("run") if "diverged" in run]
    told = [f"`{run['arm']}` with seed {run['seed']} ({run['diverged']})" for run in runs]
    return [f"Diverged: {_and(told)}."] if told else []


def _differences(found: Findings, pictures: Path) -> str:
    others = [protocol.BASE, *(arm for arm in found.arms if arm != protocol.BASELINE)]
    parts = [
        f"## Differences from `{protocol.BASELINE}`\n\nArm less `{protocol.BASELINE}`, paired by seed: mean and "
        f"{protocol.LEVEL:.0%} bootstrap interval over {found.study.size.seeds} seeds. Bold: the interval leaves out 0."
    ]
    for metrics in ((*protocol.PRIMARY, *protocol.GUARDS), protocol.SECONDARY):
        rows = [
            [f"`{arm}`", *(_interval(found.difference(arm, protocol.BASELINE, metric)) for metric in metrics)]
            for arm in others
        ]
        parts.append(table(["", *(f"{TITLES[metric]} {_arrow(metric)}".strip() for metric in metrics)], rows))
    panels = {}
    for metric in protocol.PRIMARY:
        estimates = {arm: found.difference(arm, protocol.BASELINE, metric) for arm in others}
        panels[f"{TITLES[metric]}: arm less {protocol.BASELINE}"] = {a: e for a, e in estimates.items() if e}
    draw_differences(panels, pictures / "differences.png")
    return "\n\n".join([*parts, "![differences of every seed, their mean and its interval](study/differences.png)"])


def _contrasts(found: Findings) -> str:
    rows = [
        [f"`{arm}` less `{other}`", about, *(_interval(found.difference(arm, other, m)) for m in protocol.PRIMARY)]
        for arm, other, about in protocol.CONTRASTS
        if {arm, other} <= set(found.arms)
    ]
    return f"## What a difference comes from\n\n{table(['', 'differ in', *_titles(protocol.PRIMARY)], rows)}"


def _costs(found: Findings) -> str:
    seconds = newest_costs(found.results)
    rows, again = [], []
    for arm in found.arms:
        ratio = relative(seconds, arm)
        fitting = steps_in_the_same_time(seconds, arm, found.steps)
        cost = f"{1000 * np.median(seconds[arm]):.0f} ms"
        rows.append([f"`{arm}`", cost, f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", str(fitting)])
        if fitting != found.steps:
            again.append((arm, fitting))
    text = f"""## Cost of a step, and equal time

Steps of all arms measured in turns, {len(seconds[protocol.BASELINE])} rounds: median, and median ratio to
`{protocol.BASELINE}` with its interval over the rounds. Costs within {protocol.SAME_TIME:.0%}, or whose interval holds
1, count as equal.

{table(["", "step", f"over `{protocol.BASELINE}`", "steps in the same time"], rows)}

"""
    if not again:
        return text + "All costs count as equal: equal steps are equal time here, and the tables above stand for both."
    rows = [
        [f"`{arm}`", str(steps), *(_interval(found.difference(arm, protocol.BASELINE, m, steps)) for m in GUARDED)]
        for arm, steps in again
    ]
    return text + (
        f"Arms whose cost differs, trained again for as many steps as fit into the time of {found.steps} steps of "
        f"`{protocol.BASELINE}`, less `{protocol.BASELINE}`:\n\n{table(['', 'steps', *_titles(GUARDED)], rows)}"
    )


GUARDED = (*protocol.PRIMARY, *protocol.GUARDS)


def _sensitivity(found: Findings) -> str:
    rows = []
    for arm in (protocol.BASE, *found.arms):
        steps = 0 if arm == protocol.BASE else found.steps
        runs = [run["sensitivity"] for run in found.results.all("run", arm=arm, steps=steps) if "sensitivity" in run]
        if runs:
            growth = [np.divide(run["permuted"], run["ordered"]) for run in runs]
            rows.append([f"`{arm}`", *(f"{value:.3f}" for value in np.mean(growth, 0))])
    return f"""## Sensitivity to the order of frames

The mean squared error of flow matching of held-out clips whose latent frames are permuted, over that of the clips as
they are; the same loss, noise and permutations for every arm. 1 means that the order makes no difference to the
network. Means over the seeds, by noise level.

{table(["", *(f"{sigma:g}" for sigma in protocol.SIGMAS)], rows)}"""


def _pictures(found: Findings, pictures: Path) -> str:
    study, clip = found.study, found.study.run.clip
    held_out = choose_prompts(study)
    prompts = read_prompts(held_out.prompts)
    real = {row.video: row.path for row in read_metadata(study.output / "held_out")}
    lines = ["## Samples\n\nSeed 0, the same noise in every row; the first row is a real clip with this caption."]
    for number, prompt in enumerate(prompts[:PICTURED]):
        files = {"real": real[held_out.records[held_out.numbers[number]].video]}
        for arm in (protocol.BASE, *found.arms):
            steps = 0 if arm == protocol.BASE else found.steps
            files[arm] = study.folder(arm, 0, steps) / "samples" / f"{number:03d}.mp4"
        shown = {
            name: video.read_clip(file, clip.frames, clip.height, clip.width, clip.fps)
            for name, file in files.items()
            if file.exists()  # an arm that diverged has no samples
        }
        draw_prompt(shown, pictures / f"prompt_{number}.png")
        lines.append(f"**{prompt}**\n\n![{prompt}](study/prompt_{number}.png)")
    return "\n\n".join(lines)


# --- What it means ---------------------------------------------------------------------------------------------------


def _follows(found: Findings) -> str:
    lines = [_verdict(found)]
    lines += [_sentence(found, protocol.TREATMENT, protocol.BASELINE, metric) for metric in GUARDED]
    lines += [_sentence(found, protocol.BASELINE, protocol.BASE, metric) for metric in protocol.PRIMARY]
    lines += [line for metric in protocol.PRIMARY if (line := _noise(found, metric))]
    lines.append(_chance(found))
    return "## What follows\n\n" + "\n".join(f"- {line}" for line in lines if line)


def _verdict(found: Findings) -> str:
    """The decision by the rule of the protocol."""
    if protocol.TREATMENT not in found.arms:
        return f"`{protocol.TREATMENT}` was not run: the question of the study is open."
    signs = {m: sign(found.difference(protocol.TREATMENT, protocol.BASELINE, m), m) for m in GUARDED}
    best, worst = (all(signs[m] == s for m in protocol.PRIMARY) for s in (1, -1))
    kept = all(signs[m] != -1 for m in protocol.GUARDS)
    question = f"Does `{protocol.TREATMENT}` move better than `{protocol.BASELINE}` at equal steps, by the rule above?"
    if None in signs.values():
        return f"**{question} Not decided**: a metric has no finite number in some run."
    if best and kept:
        return f"**{question} Yes**, on this model and these clips."
    if best:
        return f"**{question} No**: both deciding metrics are better, but one that must not get worse is worse."
    if worst:
        return f"**{question} No, it moves worse.**"
    if all(signs[m] == 0 for m in protocol.PRIMARY):
        return f"**{question} No difference is seen** at this size."
    return f"**{question} No**: not both of the deciding metrics are better."


def sign(difference: Estimate | None, metric: str) -> int | None:
    """1 better, -1 worse, 0 no difference seen, None not measurable."""
    if difference is None:
        return None
    if not difference.seen:
        return 0
    return 1 if (difference.value < 0) == (metric in protocol.LESS_IS_BETTER) else -1


def _sentence(found: Findings, arm: str, other: str, metric: str) -> str:
    names = f"`{arm}` less `{other}`, {TITLES[metric]}"
    difference = found.difference(arm, other, metric)
    if difference is None:
        return f"{names}: cannot be compared."
    largest = max(abs(difference.low), abs(difference.high))
    result = {
        1: "better",
        -1: "worse",
        0: f"no difference seen; one of more than {largest:.3g} is outside the interval",
    }[sign(difference, metric) or 0]
    return f"{names}: {_interval(difference)}, {result}."


def _noise(found: Findings, metric: str) -> str:
    """How far the seeds of the baseline are apart, beside the difference that the study is for."""
    numbers = [value for value in found.by_seed(protocol.BASELINE, metric).values() if value is not None]
    difference = found.difference(protocol.TREATMENT, protocol.BASELINE, metric)
    if len(numbers) < 2 or difference is None:
        return ""
    return (
        f"{TITLES[metric]}: two seeds of `{protocol.BASELINE}` differ by up to {max(numbers) - min(numbers):.3g}, the "
        f"means of `{protocol.TREATMENT}` and `{protocol.BASELINE}` by {abs(difference.value):.3g}."
    )


def _chance(found: Findings) -> str:
    arms = [arm for arm in found.arms if arm != protocol.BASELINE]
    intervals = [found.difference(arm, protocol.BASELINE, m) for arm in arms for m in protocol.PRIMARY]
    measured = [estimate for estimate in intervals if estimate]
    seen, covered = sum(estimate.seen for estimate in measured), coverage(found.study.size.seeds)
    return (
        f"Of {len(measured)} intervals of deciding metrics in the table of differences between arms, {seen} leave out "
        f"0. Such an interval over {found.study.size.seeds} normal numbers holds their mean in {covered:.0%} of the "
        f"cases, so that {(1 - covered) * len(measured):.1f} would leave out 0 if no arm differed from "
        f"`{protocol.BASELINE}`."
    )


def _does_not_follow(found: Findings) -> str:
    run, size = found.study.run, found.study.size
    return f"""## What does not follow

- Nothing about Wan2.1 at 1.3B or 14B, about real videos, or about other motions than {_and(size.laws)}: the model has
  {run.model.layers} layers of width {run.model.dim}, a clip has {run.clip.latent_size[0]} latent frames.
- Nothing about longer training, another learning rate or rank: all arms have the same ones.
- Where no difference is seen, that there is none: only that it is inside the interval, if the interval is to be
  believed, and with few seeds it is too short.
- Nothing about how samples look: the metrics follow centres, sizes and changes of pixels."""


# --- Formats ---------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _spread(by_seed: dict[int, float | None]) -> str:
    numbers = [value for value in by_seed.values() if value is not None]
    if not numbers:
        return "–"
    missing = f" ({len(by_seed) - len(numbers)} of {len(by_seed)} –)" if len(numbers) < len(by_seed) else ""
    return f"{np.mean(numbers):.3g} ± {np.std(numbers, ddof=min(1, len(numbers) - 1)):.2g}{missing}"


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    text = f"{estimate.value:+.3g} [{estimate.low:+.3g}, {estimate.high:+.3g}]"
    return f"**{text}**" if estimate.seen else text


def _arrow(metric: str) -> str:
    """Which way is better."""
    return "↓" if metric in protocol.LESS_IS_BETTER else "↑" if metric in protocol.MORE_IS_BETTER else ""


def _titles(metrics: Sequence[str]) -> list[str]:
    return [f"{TITLES[metric]} {_arrow(metric)}".strip() for metric in metrics]


def _and(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
