"""Fine-tune the embedded model with flow matching, with TFM and with its controls, and compare the motion.

    python scripts/study.py

Trains every arm with every seed, samples held-out prompts, measures the samples and writes docs/study.md with its
pictures. Started again, it continues where it stopped; with more arms or seeds, it adds them. Several processes that
are started at the same time share the runs.
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
                "sampling.seed", "objective.kind", "data.source", "data.path")  # fmt: skip
"""Fields of the configuration that the command line may not set."""
FULL = Size()


@section
class Options:
    config: Path = Path("wan_tiny")
    """YAML file, or the name of a shipped configuration: model, clips, LoRA, optimizer, sampling."""
    output: NonEmptyPath = Path("runs/study")
    """Folder of all runs and results.jsonl."""
    docs: NonEmptyPath = Path("docs")
    """Folder of study.md."""
    arms: tuple[str, ...] = FULL.arms
    """Arms to compare."""
    seeds: int = FULL.seeds
    """Number of training seeds: 0, 1, ..."""
    steps: Positive = 200
    """Number of training steps."""
    clips: int = FULL.clips
    """Number of clips to train on."""
    prompts: int = FULL.prompts
    """Number of prompts to sample."""
    reference: int = FULL.reference
    """Number of real clips to compare with."""
    rounds: int = FULL.rounds
    """Number of rounds in which the cost of a step is measured."""
    laws: tuple[str, ...] = FULL.laws
    """Laws of motion of all clips."""
    run: StudyRun


def execute(argv: Sequence[str]) -> None:
    line = command.parse(Options, argv, "python scripts/study.py", __doc__)
    for name, value in line.fields.items():
        if name in SET_BY_STUDY:
            raise InputError(f"--{name}={value}: the study sets it; expected another field")
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
