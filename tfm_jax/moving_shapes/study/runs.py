"""Runs a study: makes clips and latents once, then trains, exports, samples and measures every arm with every seed.

Each part calls the code of the corresponding program, and all parts run in one process.
"""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tfm_jax import config as configs
from tfm_jax import video
from tfm_jax.config import ObjectiveConfig, section
from tfm_jax.data.batches import Batches
from tfm_jax.data.metadata import read_metadata
from tfm_jax.data.prepare import PrepareRun, prepare
from tfm_jax.data.records import REJECTED, Records, open_records
from tfm_jax.errors import InputError, NonFiniteLoss
from tfm_jax.files import lock
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.files import read_lora
from tfm_jax.moving_shapes.evaluation.folders import measure_folder
from tfm_jax.moving_shapes.evaluation.set_metrics import ClipSet, Row, compare
from tfm_jax.moving_shapes.numbers import finite_or_none
from tfm_jax.moving_shapes.scene import LAWS, ClipSpec
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.cost import measure_cost, steps_at_equal_time
from tfm_jax.moving_shapes.study.results import Record, Results
from tfm_jax.moving_shapes.study.sensitivity import measure_sensitivity
from tfm_jax.moving_shapes.world import has_clips, write_clips
from tfm_jax.prompts import write_prompts
from tfm_jax.sampling.pipeline import SampleRun, sample
from tfm_jax.sharding import one_device_mesh
from tfm_jax.train.export import export
from tfm_jax.train.loop import TrainRun, train
from tfm_jax.wan import find_base, load_base, load_vae

CLIP_SEEDS = {"clips": 1000, "held_out": 1001, "reference": 1002}
"""Folder of real clips -> seed. The three folders are for training, for the prompts and for comparison."""
SENSITIVITY_CLIPS = 16
"""Maximum number of held-out clips on which the sensitivity to the order of frames is measured."""


@section
class StudyRun(configs.TrainingSections):
    """The configuration sections that a study reads.

    The study itself sets the paths of data and outputs, the seeds and `objective.kind`.
    """

    sampling: configs.SamplingConfig


class Size(NamedTuple):
    """The size of a study. The defaults are the full study."""

    arms: tuple[str, ...] = tuple(protocol.ARMS)
    seeds: int = 5
    clips: int = 256
    """Number of training clips."""
    prompts: int = 16
    """Number of prompts, which no training clip has as its caption. Each arm samples every prompt once per seed."""
    reference: int = 128
    """Number of real clips with which the samples are compared."""
    rounds: int = 30
    """Number of rounds in which the cost of a step is measured."""
    laws: tuple[str, ...] = ("bouncing",)
    """Laws of motion of all clips, which have one object each, unless the law fixes another number."""


class Study(NamedTuple):
    """A study: its configuration, its size and its output folder."""

    run: StudyRun
    size: Size
    output: Path

    @property
    def spec(self) -> ClipSpec:
        clip = self.run.clip
        return ClipSpec(clip.frames, (clip.height, clip.width), clip.rate)

    def objective(self, arm: str) -> ObjectiveConfig:
        return dataclasses.replace(self.run.objective, **protocol.ARMS[arm].objective)

    def folder(self, arm: str, seed: int, steps: int) -> Path:
        """The output folder of a run."""
        return self.output / arm / f"seed{seed}_steps{steps}"


def run_study(study: Study) -> Results:
    """Run everything that is not yet in `results.jsonl`, seed by seed, so that arms can be compared at any time.

    Several processes may run the same study at once; each of them returns when the study is complete.

    Raises:
        InputError: the settings are invalid or differ from those of the started study, or the model is missing.
    """
    check(study)
    locks = study.output / "locks"
    with lock(locks / "start", wait=True):
        results = Results(study.output / "results.jsonl", settings(study))
        make_clips(study)
        held_out = choose_prompts(study)
        reference = measure_folder(study.output / "reference", None, study.spec, minimum=4)
        if not results.one("real"):
            results.add("real", **_measure_autoencoder(study, held_out, reference))
        if not set(study.size.arms) <= latest_costs(results).keys():
            results.add("cost", seconds=_costs(study))
    for wait in (False, True):  # first run what no other process is running, then wait for the rest
        for seed, arm, steps in planned_runs(study, results):
            with lock(locks / f"{arm}_seed{seed}_steps{steps}", wait=wait) as mine:
                results.reload()
                if mine and not results.one("run", arm=arm, seed=seed, steps=steps):
                    print(f"{arm}, seed {seed}, {steps} steps", flush=True)
                    record = _run(study, arm, seed, steps, held_out, reference)
                    results.add("run", arm=arm, seed=seed, steps=steps, **record)
    return results


def check(study: Study) -> None:
    """Raise InputError if the size or the clip length is invalid, or if the model is missing."""
    size = study.size
    for arm in size.arms:
        if arm not in protocol.ARMS:
            raise InputError(f"--arms={arm}: expected one of {', '.join(protocol.ARMS)}")
    if protocol.BASELINE not in size.arms:
        raise InputError(f"--arms={','.join(size.arms)}: expected {protocol.BASELINE} among them, for comparison")
    for name, least in (("seeds", 2), ("clips", 1), ("prompts", 2), ("reference", 4), ("rounds", 1)):
        if getattr(size, name) < least:
            raise InputError(f"--{name}={getattr(size, name)}: expected at least {least}")
    for law in size.laws:
        if law not in LAWS:
            raise InputError(f"--laws={law}: expected one of {', '.join(LAWS)}")
    find_base(study.run.model)
    if study.spec.frames < 5:
        raise InputError(f"clip.frames={study.spec.frames}: expected at least 5, which give two latent frames")


def settings(study: Study) -> Record:
    """Return the settings that must not change when a study continues; arms, seeds and rounds may change."""
    values = configs.plain(study.run)
    ignored = ("output", "prompts", "lora", "path", "log_every", "checkpoint_every", "keep_checkpoints", "seed")
    run = {name: {f: v for f, v in part.items() if f not in ignored} for name, part in values.items()}
    size = study.size._asdict()
    for name in ("arms", "seeds", "rounds"):
        size.pop(name)
    size["laws"] = list(study.size.laws)
    return {"config": run, "size": size, "weights": _fingerprint(study.run.model.path)}


def _fingerprint(model: Path) -> str:
    """Return the first 16 digits of the SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for file in sorted(model.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def planned_runs(study: Study, results: Results) -> Iterator[tuple[int, str, int]]:
    """Yield (seed, arm, steps) of every run: the base model, then each arm.

    An arm runs at equal steps and, if its cost differs from the baseline's, also at equal time.
    """
    steps = study.run.train.steps
    seconds = latest_costs(results)
    for seed in range(study.size.seeds):
        yield seed, protocol.BASE, 0
        for arm in study.size.arms:
            yield seed, arm, steps
            fitting = steps_at_equal_time(seconds, arm, steps)
            if fitting != steps:
                yield seed, arm, fitting


# --- Clips -----------------------------------------------------------------------------------------------------------


def make_clips(study: Study) -> None:
    """Make the missing sets of real clips, and the missing latents of all sets but the reference."""
    clip, size = study.run.clip, study.size
    # Twice as many held-out clips as prompts, because some of their captions also belong to training clips.
    counts = {"clips": size.clips, "held_out": 2 * size.prompts, "reference": size.reference}
    for name, count in counts.items():
        folder = study.output / name
        if not has_clips(folder):
            seed = CLIP_SEEDS[name]
            write_clips(folder, count, *study.spec, seed=seed, laws=size.laws, num_objects=(1,))
    for name in ("clips", "held_out"):
        data = configs.DataConfig(source=study.output / name, path=latents_folder(study, name))
        if not data.path.exists():
            prepare(PrepareRun(model=study.run.model, clip=clip, data=data))
        if (data.path / REJECTED).exists():
            raise InputError(f"{data.path / REJECTED}: lists rejected clips; remove {data.source} and {data.path}")


def latents_folder(study: Study, name: str) -> Path:
    """Return the folder with the latents of a set of clips."""
    return study.output / f"{name}_latents"


class HeldOut(NamedTuple):
    """The held-out clips, and which of them provide the prompts."""

    records: Records
    numbers: tuple[int, ...]
    """For each prompt, the index of its record."""
    prompts: Path
    """Text file with one prompt per line."""


def choose_prompts(study: Study) -> HeldOut:
    """Write distinct captions of held-out clips, none of them the caption of a training clip, to prompts.txt.

    Raises:
        InputError: there are too few such captions.
    """
    known = {clip.prompt for clip in read_metadata(study.output / "clips")}
    records = open_records(latents_folder(study, "held_out"))
    new: dict[str, int] = {}
    for number in range(len(records)):
        if (prompt := records[number].prompt) not in known:
            new.setdefault(prompt, number)
    if len(new) < study.size.prompts:
        raise InputError(f"--prompts={study.size.prompts}: expected at most {len(new)}, the number of new captions")
    prompts = list(new)[: study.size.prompts]
    file = study.output / "prompts.txt"
    write_prompts(file, prompts)
    return HeldOut(records, tuple(new[prompt] for prompt in prompts), file)


# --- Measuring -------------------------------------------------------------------------------------------------------


def _measure_autoencoder(study: Study, held_out: HeldOut, reference: ClipSet) -> Record:
    """Measure held-out clips that passed through the autoencoder, the best that a model can reach.

    Return these metrics with those of the reference and the floor.
    """
    vae = load_vae(study.run.model.path)
    folder = study.output / "autoencoder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, record in enumerate(held_out.numbers):
        pixels = vae.decode(jnp.asarray(held_out.records[record].latents)[None])
        video.write_clip(folder / f"{number:03d}.mp4", video.to_uint8(np.asarray(pixels)[0]), study.spec.fps)
    rows, compared = _measure(study, folder, held_out, reference)
    return {"compared": compared, **{side: column(rows, side) for side in ("generated", "reference", "floor")}}


def _measure(study: Study, folder: Path, held_out: HeldOut, reference: ClipSet) -> tuple[list[Row], int]:
    samples = measure_folder(folder, held_out.prompts, study.spec, minimum=2)
    return compare(samples, reference)


def column(rows: Sequence[Row], side: str) -> dict[str, float | None]:
    """Map each metric to one side of its row (generated, reference or floor); None if the number is not finite."""
    return {row.metric: finite_or_none(getattr(row, side)) for row in rows}


def latest_costs(results: Results) -> dict[str, list[float]]:
    """Map each arm to the seconds per step in each round of the last measurement.

    Costs from different measurements cannot be compared.
    """
    measured = results.all("cost")
    return measured[-1]["seconds"] if measured else {}


def _costs(study: Study) -> dict[str, list[float]]:
    print("measuring the cost of a step of every arm", flush=True)
    run = _train_run(study, protocol.BASELINE, 0, study.run.train.steps)
    seconds = measure_cost(run, {arm: study.objective(arm) for arm in study.size.arms}, study.size.rounds)
    return {arm: [round(second, 5) for second in each] for arm, each in seconds.items()}


def _train_run(study: Study, arm: str, seed: int, steps: int) -> TrainRun:
    run = study.run
    settings = dataclasses.replace(
        run.train,
        output=study.folder(arm, seed, steps),
        steps=steps,
        seed=seed,
        checkpoint_every=steps,
        log_every=steps,
    )
    data = configs.DataConfig(path=latents_folder(study, "clips"))
    return TrainRun(
        model=run.model, clip=run.clip, data=data, train=settings, lora=run.lora, objective=study.objective(arm),
        optimizer=run.optimizer,
    )  # fmt: skip


def _run(study: Study, arm: str, seed: int, steps: int, held_out: HeldOut, reference: ClipSet) -> Record:
    """Train, export, sample and measure one arm with one seed."""
    folder = study.folder(arm, seed, steps)
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted study
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[name] = round(time.perf_counter() - start, 2)
        return result

    lora = None
    if arm != protocol.BASE:
        lora = folder / "lora.safetensors"
        try:
            timed("train", lambda: train(_train_run(study, arm, seed, steps)))
        except NonFiniteLoss as error:
            return {"diverged": str(error), "seconds": seconds}
        timed("export", lambda: export(folder, lora, "comfy", np.dtype(np.float32)))
    sampling = dataclasses.replace(
        study.run.sampling, prompts=held_out.prompts, output=folder / "samples", lora=lora, seed=seed
    )
    timed("sample", lambda: sample(SampleRun(model=study.run.model, clip=study.run.clip, sampling=sampling)))
    rows, _ = timed("measure", lambda: _measure(study, sampling.output, held_out, reference))
    sensitivity = timed("sensitivity", lambda: _sensitivity(study, lora, held_out))
    return {"metrics": column(rows, "generated"), "sensitivity": sensitivity, "seconds": seconds}


def _sensitivity(study: Study, lora: Path | None, held_out: HeldOut) -> dict[str, list[float]]:
    """Measure the sensitivity to the order of frames, on the same clips, permutations and noise for all runs."""
    transformer = load_base(study.run.model)
    if lora:
        load_adapters(transformer, read_lora(lora))
    batch, _ = Batches(held_out.records, min(SENSITIVITY_CLIPS, len(held_out.records)), 0, one_device_mesh()).read(0)
    return measure_sensitivity(transformer, np.asarray(batch.latents), np.asarray(batch.text), seed=0)
