"""A study: its configuration, its size, its folders, and the runs that it consists of."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tfm_jax import config as configs
from tfm_jax.config import ObjectiveConfig, section
from tfm_jax.config.reading import shown
from tfm_jax.errors import InputError
from tfm_jax.moving_shapes.scene import LAWS, ClipSpec
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.results import Record, Results
from tfm_jax.wan import find_base


@section
class StudyRun(configs.TrainingSections):
    """The configuration sections that a study reads.

    The study itself sets the paths of data and outputs, the seeds, steps, batch size, learning rate and
    `objective.kind`.
    """

    sampling: configs.SamplingConfig


class Size(NamedTuple):
    """The size of a study. The defaults are the full study."""

    arms: tuple[str, ...] = tuple(protocol.ARMS)
    laws: tuple[str, ...] = protocol.LAWS
    seeds: int = protocol.SEEDS
    lengths: tuple[int, ...] = protocol.LENGTHS
    learning_rate: float = protocol.LEARNING_RATE
    batch_size: int = protocol.BATCH_SIZE
    clips: int = protocol.CLIPS
    prompts: int = protocol.PROMPTS
    reference: int = protocol.REFERENCE
    rounds: int = protocol.ROUNDS


class Run(NamedTuple):
    """One training, or the base model; it is measured after each number of steps in `lengths`."""

    law: str
    arm: str
    seed: int
    lengths: tuple[int, ...]
    learning_rate: float

    @property
    def keys(self) -> Record:
        """What identifies the run in the results file."""
        return {"law": self.law, "arm": self.arm, "seed": self.seed, "learning_rate": self.learning_rate}

    @property
    def name(self) -> str:
        """The folder of the run, relative to that of its law."""
        if self.arm == protocol.BASE:
            return f"{self.arm}/seed{self.seed}"
        return f"{self.arm}/rate{self.learning_rate:g}_seed{self.seed}"

    def is_done(self, results: Results) -> bool:
        """Whether all measurements of the run are in the results."""
        return all(results.one("run", **self.keys, steps=steps) for steps in self.lengths)


class Study(NamedTuple):
    """A study: its configuration, its size and its folders."""

    run: StudyRun
    size: Size
    output: Path
    """Folder of clips, latents, runs and samples, which can be made again."""
    docs: Path
    """Folder of study.md, and of study/ with the results and the pictures."""

    @property
    def spec(self) -> ClipSpec:
        clip = self.run.clip
        return ClipSpec(clip.frames, (clip.height, clip.width), clip.rate)

    @property
    def results(self) -> Path:
        return self.docs / "study" / "results.jsonl"

    @property
    def pilot_results(self) -> Path:
        return self.docs / "study" / "pilot.jsonl"

    def objective(self, arm: str) -> ObjectiveConfig:
        return dataclasses.replace(self.run.objective, **protocol.ARMS[arm].objective)

    def arms(self, law: str) -> tuple[str, ...]:
        """The arms that are run on a law."""
        left_out = () if law == self.size.laws[0] else protocol.FIRST_LAW_ONLY
        return tuple(arm for arm in self.size.arms if arm not in left_out)

    def find_run(self, law: str, arm: str, seed: int) -> Run:
        if arm == protocol.BASE:
            return Run(law, arm, seed, (0,), 0.0)
        return Run(law, arm, seed, self.size.lengths, self.size.learning_rate)

    def folder(self, run: Run) -> Path:
        return self.output / run.law / run.name

    def samples(self, run: Run, steps: int) -> Path:
        """The folder of the samples of a run after so many steps."""
        return self.folder(run) / f"samples_step{steps}"


def planned_runs(study: Study) -> Iterator[Run]:
    """Yield every run: first those that decide, then those that explain the decision, both seed by seed."""
    deciding = (protocol.BASE, protocol.BASELINE, protocol.TREATMENT)
    for decides in (True, False):
        for seed in range(study.size.seeds):
            for law in study.size.laws:
                for arm in (protocol.BASE, *study.arms(law)):
                    if (arm in deciding) == decides:
                        yield study.find_run(law, arm, seed)


def pilot_runs(study: Study) -> Iterator[Run]:
    """Yield the runs of the pilot: the base model, and plain flow matching with several learning rates."""
    for seed in protocol.PILOT_SEEDS:
        for law in study.size.laws:
            yield study.find_run(law, protocol.BASE, seed)
            for rate in protocol.PILOT_LEARNING_RATES:
                yield Run(law, protocol.BASELINE, seed, protocol.PILOT_LENGTHS, rate)


def check(study: Study) -> None:
    """Raise InputError if the size or the clip length is invalid, or if the model is missing."""
    size = study.size
    for arm in size.arms:
        if arm not in protocol.ARMS:
            raise InputError(f"--arms={arm}: expected one of {', '.join(protocol.ARMS)}")
    if protocol.BASELINE not in size.arms:
        raise InputError(f"--arms={','.join(size.arms)}: expected {protocol.BASELINE} among them, for comparison")
    least = {"seeds": 2, "batch_size": 1, "clips": size.batch_size, "prompts": 2, "reference": 4, "rounds": 1}
    for name, number in least.items():
        if getattr(size, name) < number:
            raise InputError(f"--{name}={getattr(size, name)}: expected at least {number}")
    if not size.lengths or size.lengths[0] < 1 or sorted(set(size.lengths)) != list(size.lengths):
        raise InputError(f"--lengths={shown(size.lengths)}: expected growing numbers of steps, such as [100, 300]")
    if not size.laws or len(set(size.laws)) < len(size.laws):
        raise InputError(f"--laws={shown(size.laws)}: expected different laws of motion, such as [gravity, orbit]")
    for law in size.laws:
        if law not in LAWS:
            raise InputError(f"--laws={law}: expected one of {', '.join(LAWS)}")
    find_base(study.run.model)
    if study.spec.frames < 5:
        raise InputError(f"clip.frames={study.spec.frames}: expected at least 5, which give two latent frames")


def settings(study: Study) -> Record:
    """Return the settings that must not change when a study continues.

    Seeds, rounds, arms and laws may change.
    """
    return {
        **pilot_settings(study),
        "lengths": list(study.size.lengths),
        "learning_rate": study.size.learning_rate,
    }


def pilot_settings(study: Study) -> Record:
    """Return the settings that the pilot shares with the study, which clips and samples depend on."""
    values = configs.plain(study.run)
    ignored = ("output", "prompts", "lora", "path", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every",
               "epochs", "accumulate", "seed", "learning_rate", "schedule", "eval_every", "eval_clips", "sample_every",
               "tensorboard", "wandb")  # fmt: skip
    run = {name: {f: v for f, v in part.items() if f not in ignored} for name, part in values.items()}
    del run["train"]["steps"]  # those of every run are recorded with it
    size = {name: getattr(study.size, name) for name in ("clips", "prompts", "reference")}
    return {"config": run, "size": size, "weights": _fingerprint(study.run.model.path)}


def _fingerprint(model: Path) -> str:
    """Return the first 16 digits of the SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for file in sorted(model.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
