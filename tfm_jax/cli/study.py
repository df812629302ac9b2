"""Fine-tune the embedded model with flow matching, TFM and control objectives, and compare the motion.

    python scripts/study.py --pilot
    python scripts/study.py

The pilot fine-tunes with plain flow matching only, at several learning rates; from its results,
tfm_jax/moving_shapes/study/protocol.py was filled in. The study trains every arm with every seed, samples held-out
prompts and measures the samples after several lengths of training, and writes docs/study.md. All results are in
docs/study/: run the same command again, on any machine, to continue an interrupted study, or with more arms or seeds to
add their runs. To share the runs among several processes, start the command several times.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tfm_jax import compile_cache
from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, section
from tfm_jax.errors import InputError
from tfm_jax.files import check_output_directory
from tfm_jax.moving_shapes.study.findings import Findings
from tfm_jax.moving_shapes.study.pilot import pilot_section
from tfm_jax.moving_shapes.study.plan import Size, Study, StudyRun, check, pilot_settings, settings
from tfm_jax.moving_shapes.study.report import write_report
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.moving_shapes.study.runs import run_pilot, run_study

SET_BY_STUDY = ("train.output", "train.steps", "train.epochs", "train.seed", "train.batch_size", "train.accumulate",
                "optimizer.learning_rate", "optimizer.schedule", "sampling.output", "sampling.prompts", "sampling.lora",
                "sampling.seed", "objective.kind", "data.source", "data.absolute_paths", "data.seed", "data.dtype",
                "data.max_rejected", "data.path", "data.held_out", "data.caption_dropout")  # fmt: skip
"""Fields of the configuration that the command line must not set."""

FULL = Size()


@section
class Options:
    config: Path = Path("wan_tiny")
    """YAML file, or the name of a shipped configuration, for the model, clips, LoRA, optimizer and sampling."""
    output: NonEmptyPath = Path("runs/study")
    """Folder to write clips, runs and samples to, all of which can be made again."""
    docs: NonEmptyPath = Path("docs")
    """Folder to write study.md to, and study/ with results.jsonl, pilot.jsonl and the pictures."""
    pilot: bool = False
    """Run the pilot instead of the study, and print what it shows. The lengths and learning rates are its own."""
    report: bool = False
    """Only write study.md, from the results so far."""
    arms: tuple[str, ...] = FULL.arms
    """Arms to compare."""
    laws: tuple[str, ...] = FULL.laws
    """Laws of motion to fine-tune on, one after another; on all but the first, only the main arms are run."""
    seeds: int = FULL.seeds
    """Number of training seeds; they are 0, 1, ..."""
    lengths: tuple[int, ...] = FULL.lengths
    """Numbers of training steps after which to measure."""
    learning_rate: Annotated[float, Field(gt=0)] = FULL.learning_rate
    """Learning rate of all arms."""
    batch_size: int = FULL.batch_size
    """Number of clips per step."""
    clips: int = FULL.clips
    """Number of clips of each law to train on."""
    prompts: int = FULL.prompts
    """Number of prompts to sample."""
    reference: int = FULL.reference
    """Number of real clips to compare the samples with."""
    rounds: int = FULL.rounds
    """Number of rounds in which to measure the cost of a step."""
    run: StudyRun


def execute(argv: Sequence[str]) -> None:
    line = command.parse(Options, argv, "python scripts/study.py", __doc__)
    compile_cache.enable()
    for name, value in line.fields.items():
        if name in SET_BY_STUDY:
            raise InputError(f"--{name}={value}: the study sets this field; remove the option")
    options = line.options()
    if options.pilot and options.report:
        raise InputError("--pilot: expected without --report, which shows the results of study and pilot")
    check_output_directory("--output", options.output)
    check_output_directory("--docs", options.docs)
    study = make_study(options)
    if options.pilot:
        results = run_pilot(study)
        print(pilot_section(study, results))
        print(f"done: see {study.pilot_results}")
        return
    check(study)
    results = Results(study.results, settings(study)) if options.report else run_study(study)
    found = Findings(study, results, Results(study.pilot_results, pilot_settings(study)))
    given = [argument for argument in argv if argument != "--report"]
    print(f"done: see {write_report(found, f'python scripts/study.py {shlex.join(given)}'.strip())}")


def make_study(options: Options) -> Study:
    """Return the study with these options, in the configuration of which the size is set."""
    size = Size(**{name: getattr(options, name) for name in Size._fields})
    run = dataclasses.replace(options.run, train=dataclasses.replace(options.run.train, batch_size=size.batch_size))
    return Study(run, size, options.output, options.docs)


def main() -> None:
    command.run(execute)
