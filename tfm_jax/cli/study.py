"""Fine-tune the embedded model with flow matching, TFM and control objectives, and compare the motion.

    python scripts/study.py

The study trains every arm with every seed, samples held-out prompts, measures the samples, and writes docs/study.md
with its figures. Run the same command again to continue an interrupted study, or with more arms or seeds to add their
runs. To share the runs among several processes, start the command several times.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, Positive, section
from tfm_jax.errors import InputError
from tfm_jax.files import check_output_directory
from tfm_jax.moving_shapes.study.report import write_report
from tfm_jax.moving_shapes.study.runs import Size, Study, StudyRun, run_study

SET_BY_STUDY = ("train.output", "train.steps", "train.seed", "sampling.output", "sampling.prompts", "sampling.lora",
                "sampling.seed", "objective.kind", "data.source", "data.absolute_paths", "data.seed",
                "data.path")  # fmt: skip
"""Fields of the configuration that the command line must not set."""

FULL = Size()


@section
class Options:
    config: Path = Path("wan_tiny")
    """YAML file, or the name of a shipped configuration, for the model, clips, LoRA, optimizer and sampling."""
    output: NonEmptyPath = Path("runs/study")
    """Folder to write all runs and results.jsonl to."""
    docs: NonEmptyPath = Path("docs")
    """Folder to write study.md to."""
    arms: tuple[str, ...] = FULL.arms
    """Arms to compare."""
    seeds: int = FULL.seeds
    """Number of training seeds; they are 0, 1, ..."""
    steps: Positive = 200
    """Number of training steps."""
    clips: int = FULL.clips
    """Number of clips to train on."""
    prompts: int = FULL.prompts
    """Number of prompts to sample."""
    reference: int = FULL.reference
    """Number of real clips to compare the samples with."""
    rounds: int = FULL.rounds
    """Number of rounds in which to measure the cost of a step."""
    laws: tuple[str, ...] = FULL.laws
    """Laws of motion of the clips."""
    run: StudyRun


def execute(argv: Sequence[str]) -> None:
    line = command.parse(Options, argv, "python scripts/study.py", __doc__)
    for name, value in line.fields.items():
        if name in SET_BY_STUDY:
            raise InputError(f"--{name}={value}: the study sets this field; remove the option")
    options = line.options()
    run = dataclasses.replace(options.run, train=dataclasses.replace(options.run.train, steps=options.steps))
    size = Size(**{name: getattr(options, name) for name in Size._fields})
    check_output_directory("--output", options.output)
    study = Study(run, size, options.output)
    results = run_study(study)
    report = write_report(study, results, options.docs, f"python scripts/study.py {shlex.join(argv)}".strip())
    print(f"done: see {report}")


def main() -> None:
    command.run(execute)
