"""Writes docs/study.md from the results of a study: no number, and no sentence about one, is written by hand."""

from pathlib import Path

import numpy as np

from tfm_jax import video
from tfm_jax.data.metadata import read_metadata
from tfm_jax.files import replacing
from tfm_jax.markdown import table
from tfm_jax.moving_shapes.bootstrap import CONFIDENCE
from tfm_jax.moving_shapes.evaluation.set_metrics import TITLES
from tfm_jax.moving_shapes.numbers import format_number
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.conclusions import GUARDED, conclusions, limits
from tfm_jax.moving_shapes.study.cost import relative_cost, steps_at_equal_time
from tfm_jax.moving_shapes.study.findings import Findings
from tfm_jax.moving_shapes.study.formats import enumerate_words, format_interval, format_spread, titles_with_arrows
from tfm_jax.moving_shapes.study.pictures import draw_differences, draw_prompt
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.moving_shapes.study.runs import Study, choose_prompts, latest_costs
from tfm_jax.prompts import read_prompts

NUM_PICTURES = 4
"""Number of prompts, counted from the first, for which samples are shown."""


def write_report(study: Study, results: Results, docs: Path, command: str) -> Path:
    """Write `docs/study.md`, and its pictures into `docs/study/`.

    Args:
        command: the command line that produced the results.
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
        conclusions(found),
        limits(found),
    ]
    file = docs / "study.md"
    with replacing(file) as scratch:
        scratch.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


# --- Method -----------------------------------------------------------------------------------------------------------


def _head(found: Findings, command: str) -> str:
    arm, folder = protocol.TREATMENT, found.study.folder(protocol.TREATMENT, 0, found.steps)
    output, clip = found.study.output, found.study.run.clip
    return f"""# Flow matching and TFM on a tiny model

The program below generates this page from `{output / "results.jsonl"}`; no number or finding on it was written by hand.
`tfm_jax/moving_shapes/study/protocol.py`, which was fixed before the first run, defines what is compared and how the
study decides.

    {command}

To continue an interrupted study, run the same command again; nothing is measured twice. Any single run can be repeated
with the ordinary programs. For `{arm}` with seed 0, for example, the commands are:

    tfm-train --config {folder}/config.yaml --train.output=runs/again
    tfm-export runs/again runs/again/lora.safetensors
    tfm-sample --config {folder}/samples/config.yaml \\
        --sampling.lora=runs/again/lora.safetensors --sampling.output=runs/again/samples
    tfm-evaluate runs/again/samples --reference={output}/reference --prompts={output}/prompts.txt \\
        --frames={clip.frames} --height={clip.height} --width={clip.width} --fps={clip.fps:g}"""


def _protocol(found: Findings) -> str:
    run, size = found.study.run, found.study.size
    rows = []
    for arm in found.arms:
        objective = found.study.objective(arm)
        rows.append(
            [f"`{arm}`", protocol.ARMS[arm].description, objective.kind, f"{objective.rho:g}", f"{objective.beta:g}"]
        )
    return f"""## What is compared

{table(["arm", "description", "objective.kind", "rho", "beta"], rows)}

A LoRA of rank {run.lora.rank} is trained on {size.clips} clips of one moving shape (law of motion:
{enumerate_words(size.laws)}) for {found.steps} steps, with batches of {run.train.batch_size} clips and AdamW at a
learning rate of {run.optimizer.learning_rate:g}. The SHA-256 of the base model's weights begins with
`{found.results.one("settings")["weights"]}`.
Videos are sampled for {size.prompts} captions that no training clip has, with {run.sampling.steps} Euler steps at
guidance {run.sampling.guidance:g}, and compared with {size.reference} real clips. For each of the {size.seeds} seeds,
all arms share the initial adapters, the order of clips, the noise, the noise levels, and the noise from which sampling
starts.

The deciding metrics are {enumerate_words(f"*{TITLES[metric]}*" for metric in protocol.PRIMARY)};
{enumerate_words(f"*{TITLES[metric]}*" for metric in protocol.GUARDS)} must not get worse. The other metrics are shown
for information.
{protocol.RULE}"""


# --- Results ---------------------------------------------------------------------------------------------------------


def _levels(found: Findings) -> str:
    """Tabulate the means over the seeds, with real clips in the first rows and the floor in the last."""
    real = found.results.one("real")
    parts = [f"## Every arm\n\nMean ± standard deviation over the seeds. {_notes(real)}"]
    for metrics in (GUARDED, protocol.SECONDARY):
        rows = [["real clips", *(format_number(real["reference"][metric]) for metric in metrics)]]
        rows += [["real, through the autoencoder", *(format_number(real["generated"][metric]) for metric in metrics)]]
        for arm in (protocol.BASE, *found.arms):
            rows.append([f"`{arm}`", *(format_spread(found.by_seed(arm, metric)) for metric in metrics)])
        rows += [["floor", *(format_number(real["floor"][metric]) for metric in metrics)]]
        parts.append(table(["", *(TITLES[metric] for metric in metrics)], rows))
    return "\n\n".join(parts + _diverged(found))


def _notes(real: dict) -> str:
    return (
        f"The floor is the mean difference between two random sets of {real['compared']} real clips, as many as each "
        "side of a comparison has; smaller differences show nothing about motion. A dash marks a number that does not "
        "exist, such as the distance of a set from itself, or that is infinite, such as the residual if at least half "
        "of the clips lose an object."
    )


def _diverged(found: Findings) -> list[str]:
    runs = [run for run in found.results.all("run") if "diverged" in run]
    texts = [f"`{run['arm']}` with seed {run['seed']} ({run['diverged']})" for run in runs]
    return [f"Diverged: {enumerate_words(texts)}."] if texts else []


def _differences(found: Findings, pictures: Path) -> str:
    others = [protocol.BASE, *(arm for arm in found.arms if arm != protocol.BASELINE)]
    parts = [
        f"## Differences from `{protocol.BASELINE}`\n\nArm less `{protocol.BASELINE}`, paired by seed: mean and "
        f"{CONFIDENCE:.0%} bootstrap interval over {found.study.size.seeds} seeds. "
        "A difference is in bold if its interval excludes 0."
    ]
    for metrics in (GUARDED, protocol.SECONDARY):
        rows = [
            [f"`{arm}`", *(format_interval(found.difference(arm, protocol.BASELINE, metric)) for metric in metrics)]
            for arm in others
        ]
        parts.append(table(["", *titles_with_arrows(metrics)], rows))
    panels = {}
    for metric in protocol.PRIMARY:
        estimates = {arm: found.difference(arm, protocol.BASELINE, metric) for arm in others}
        panels[f"{TITLES[metric]}: arm less {protocol.BASELINE}"] = {a: e for a, e in estimates.items() if e}
    draw_differences(panels, pictures / "differences.png")
    return "\n\n".join([*parts, "![difference for every seed, their mean and its interval](study/differences.png)"])


def _contrasts(found: Findings) -> str:
    columns = ["", "the arms differ in", *titles_with_arrows(protocol.PRIMARY)]
    rows = [
        [
            f"`{arm}` less `{other}`",
            about,
            *(format_interval(found.difference(arm, other, m)) for m in protocol.PRIMARY),
        ]
        for arm, other, about in protocol.CONTRASTS
        if {arm, other} <= set(found.arms)
    ]
    return f"## Where a difference comes from\n\n{table(columns, rows)}"


def _costs(found: Findings) -> str:
    seconds = latest_costs(found.results)
    rows, again = [], []
    for arm in found.arms:
        ratio = relative_cost(seconds, arm)
        fitting = steps_at_equal_time(seconds, arm, found.steps)
        cost = f"{1000 * np.median(seconds[arm]):.0f} ms"
        rows.append([f"`{arm}`", cost, f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", str(fitting)])
        if fitting != found.steps:
            again.append((arm, fitting))
    text = f"""## Cost of a step, and equal time

In each of {len(seconds[protocol.BASELINE])} rounds, one step of every arm is timed. The table shows the median time,
and the median ratio to `{protocol.BASELINE}` with its interval over the rounds. Costs count as equal if they differ by
less than {protocol.COST_TOLERANCE:.0%}, or if the interval contains 1.

{table(["", "time per step", f"ratio to `{protocol.BASELINE}`", "steps in equal time"], rows)}

"""
    if not again:
        return text + "All costs count as equal, so equal steps mean equal time here, and the tables above show both."
    rows = [
        [
            f"`{arm}`",
            str(steps),
            *(format_interval(found.difference(arm, protocol.BASELINE, m, steps)) for m in GUARDED),
        ]
        for arm, steps in again
    ]
    return text + (
        f"Arms with a different cost are trained again for as many steps as fit into the time of {found.steps} steps "
        f"of `{protocol.BASELINE}`. Their differences from `{protocol.BASELINE}` are:\n\n"
        + table(["", "steps", *titles_with_arrows(GUARDED)], rows)
    )


def _sensitivity(found: Findings) -> str:
    rows = []
    for arm in (protocol.BASE, *found.arms):
        runs = found.results.all("run", arm=arm, steps=found.steps_of(arm))
        runs = [run["sensitivity"] for run in runs if "sensitivity" in run]
        if runs:
            growth = [np.divide(run["permuted"], run["ordered"]) for run in runs]
            rows.append([f"`{arm}`", *(f"{value:.3f}" for value in np.mean(growth, 0))])
    return f"""## Sensitivity to the order of frames

The table shows the flow matching loss (mean squared error) on held-out clips with permuted latent frames, divided by
the loss on the unchanged clips: the mean over the seeds at each noise level. Loss function, noise and permutations are
the same for every arm. A ratio of 1 means that the order of frames makes no difference to the network.

{table(["", *(f"{sigma:g}" for sigma in protocol.SIGMAS)], rows)}"""


def _pictures(found: Findings, pictures: Path) -> str:
    study, clip = found.study, found.study.run.clip
    held_out = choose_prompts(study)
    prompts = read_prompts(held_out.prompts)
    real = {row.video: row.path for row in read_metadata(study.output / "held_out")}
    lines = [
        "## Samples\n\nAll samples have seed 0. The first row of each picture is a real clip with the caption; the "
        "samples in the other rows start from the same noise."
    ]
    for number, prompt in enumerate(prompts[:NUM_PICTURES]):
        files = {"real": real[held_out.records[held_out.numbers[number]].video]}
        for arm in (protocol.BASE, *found.arms):
            files[arm] = study.folder(arm, 0, found.steps_of(arm)) / "samples" / f"{number:03d}.mp4"
        shown = {
            name: video.read_clip(file, clip.frames, clip.height, clip.width, clip.fps)
            for name, file in files.items()
            if file.exists()  # an arm that diverged has no samples
        }
        draw_prompt(shown, pictures / f"prompt_{number}.png")
        lines.append(f"**{prompt}**\n\n![{prompt}](study/prompt_{number}.png)")
    return "\n\n".join(lines)
