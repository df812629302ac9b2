"""Writes docs/study.md from the results of a study: no number, and no sentence about one, is written by hand.

The page can be written at any time; it then says how many runs are done.
"""

from pathlib import Path

from tfm_jax.files import replacing
from tfm_jax.markdown import table
from tfm_jax.moving_shapes.evaluation.set_metrics import TITLES
from tfm_jax.moving_shapes.study import protocol, tables
from tfm_jax.moving_shapes.study.conclusions import conclusions, limits
from tfm_jax.moving_shapes.study.findings import Findings
from tfm_jax.moving_shapes.study.formats import enumerate_words
from tfm_jax.moving_shapes.study.pictures import picture_sections
from tfm_jax.moving_shapes.study.pilot import pilot_section
from tfm_jax.moving_shapes.study.power import family_size


def write_report(found: Findings, command: str) -> Path:
    """Write study.md into the docs folder, and its pictures into study/ there.

    Args:
        command: the command line that produces the results.
    """
    parts = [
        _head(found, command),
        conclusions(found),
        _protocol(found),
        _decision(found),
        pilot_section(found.study, found.pilot),
        tables.confirmatory(found),
        *(tables.law_section(found, law) for law in found.study.size.laws),
        tables.costs(found),
        tables.sensitivity(found),
        *picture_sections(found),
        limits(found),
    ]
    file = found.study.docs / "study.md"
    with replacing(file) as scratch:
        scratch.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


def _head(found: Findings, command: str) -> str:
    study, clip, law = found.study, found.study.run.clip, found.study.size.laws[0]
    run = study.find_run(law, protocol.TREATMENT, 0)
    folder, steps, made = study.folder(run), found.last, study.output / law
    done, planned = found.progress
    notice = "" if done == planned else f"**Incomplete: {done} of {planned} planned runs are done.**\n\n"
    return f"""# Flow matching and TFM on a tiny model

{notice}The program below generates this page from `{study.results}` and `{study.pilot_results.name}` beside it; no
number or finding on it was written by hand. `tfm_jax/moving_shapes/study/protocol.py`, which was fixed before the first
run, defines what is compared and how the study decides.

    {command}

To continue an interrupted study, on the same machine or another, run the same command again; nothing is measured twice.
With `--report`, it only writes this page. Any single run can be repeated with the ordinary programs. For
`{run.arm}` on *{law}* with seed 0, for example, the commands are:

    tfm-train --config {folder}/config.yaml --train.output=runs/again
    tfm-export runs/again runs/again/lora.safetensors --step={steps}
    tfm-sample --config {study.samples(run, steps)}/config.yaml \\
        --sampling.lora=runs/again/lora.safetensors --sampling.output=runs/again/samples
    tfm-evaluate runs/again/samples --reference={made}/reference --prompts={made}/prompts.txt \\
        --frames={clip.frames} --height={clip.height} --width={clip.width} --fps={clip.rate:g}"""


def _protocol(found: Findings) -> str:
    study, run, size = found.study, found.study.run, found.study.size
    rows = []
    for arm in size.arms:
        objective = study.objective(arm)
        laws = enumerate_words(law for law in size.laws if arm in study.arms(law))
        numbers = f"{objective.rho:g}", f"{objective.beta:g}"
        rows.append([f"`{arm}`", protocol.ARMS[arm].description, objective.kind, *numbers, laws])
    lengths = enumerate_words(map(str, size.lengths))
    return f"""## What is compared

{table(["arm", "description", "objective.kind", "rho", "beta", "laws of motion"], rows)}

For each law of motion, a LoRA of rank {run.lora.rank} is trained on {size.clips} clips of one moving shape, with
batches of {run.train.batch_size} clips and AdamW at a learning rate of {size.learning_rate:g}, constant after
{run.optimizer.warmup_steps} steps of warm-up. It trains once, and is measured after {lengths} steps, the same in all
arms. The SHA-256 of the base model's weights begins with `{found.results.settings["weights"]}`. At every length,
videos are sampled for {size.prompts} captions that no training clip has, with {run.sampling.steps} Euler steps at
guidance {run.sampling.guidance:g}, and compared with {size.reference} real clips. For each of the {size.seeds} seeds,
all arms share the initial adapters, the order of clips, the noise, the noise levels, and the noise from which sampling
starts."""


def _decision(found: Findings) -> str:
    size, count = found.study.size, family_size(found.study)
    guards = enumerate_words(f"*{TITLES[metric]}*" for metric in protocol.GUARDS)
    return f"""## How the study decides

The deciding metrics are {enumerate_words(f"*{TITLES[metric]}*" for metric in protocol.PRIMARY)};
{guards} must not get worse. The other metrics are shown for information.
{protocol.RULE}

An interval is a t interval of the differences, paired by seed. The confirmatory family is `{protocol.TREATMENT}` less
`{protocol.BASELINE}` on each deciding metric, after each length, on each law: {count} comparisons. Their intervals have
a confidence level of {found.corrected:.2%} each (Bonferroni), so that with a probability of at least
{1 - protocol.ERROR_RATE:.0%} all of them contain the true difference. All other intervals have a level of
{protocol.CONFIDENCE:.0%} each, without correction, and are exploratory. With {size.seeds} seeds, a bootstrap would give
intervals that are too short, because they cannot extend beyond the smallest and the largest difference."""
