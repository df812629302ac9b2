"""The configuration of a training run, and which of its fields may differ when the run is resumed."""

import dataclasses
from typing import Any

from tfm_jax import config as configs
from tfm_jax.config import section
from tfm_jax.config.reading import shown
from tfm_jax.errors import InputError

MAY_CHANGE = {"train.output", "train.steps", "train.epochs", "train.batch_size", "train.accumulate",
              "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every", "train.log_every",
              "train.eval_every", "train.eval_clips", "train.sample_every", "train.tensorboard", "train.wandb",
              "train.max_bad_steps", "train.remat", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor",
              "model.path", "data.path", "lora.init"}  # fmt: skip
"""Fields that may differ when a run is resumed, because they do not change what a step computes, beyond rounding. So
may the fields of `sampling`. Base weights, data and the LoRA to start from may move, but their fingerprints must stay
the same. The number of clips per step must stay the same; so must LENGTH, if the learning rate depends on it."""

LENGTH = {"train.steps", "train.epochs"}


@section
class TrainRun(configs.TrainingSections):
    """The sections of the configuration that training reads."""

    data: configs.DataConfig
    sampling: configs.SamplingConfig = dataclasses.field(default_factory=configs.SamplingConfig)
    mesh: configs.MeshConfig = dataclasses.field(default_factory=configs.MeshConfig)


def config_dict(run: TrainRun) -> dict[str, dict[str, Any]]:
    """Return the configuration that is saved: nested dictionaries, without the fields that only tfm-prepare uses."""
    values = configs.plain(run)
    values["data"] = {name: values["data"][name] for name in ("path", "held_out", "caption_dropout")}
    return values


def check_same_run(saved: dict[str, Any], now: dict[str, Any], run: TrainRun) -> None:
    """Raise InputError unless a checkpoint with metadata `saved` belongs to the run with metadata `now`.

    Of the base, the data and the LoRA to start from, only those are compared that `now` contains.
    """
    output = run.train.output
    started = f"the run in {output} was started with"
    config = configs.from_plain(TrainRun, saved["config"], str(output / "checkpoints"))
    before, after = _fields(config_dict(config)), _fields(now["config"])
    may_change = MAY_CHANGE if config.optimizer.schedule == "constant" else MAY_CHANGE - LENGTH
    for name, value in after.items():
        if name not in may_change and before[name] != value:
            raise InputError(f"{name}={shown(value)}: {started} {shown(before[name])}; expected the same value")
    for part, problem in (
        ("data", f"data.path={run.data.path}: these are not the clips"),
        ("base", f"model.path={run.model.path}: these are not the base weights"),
        ("init", f"lora.init={shown(run.lora.init)}: this is not the LoRA file"),
    ):
        if part in now and saved.get(part) != now[part]:
            raise InputError(f"{problem} that {started}")
    if config.train.clips_per_step != run.train.clips_per_step:
        given = f"train.batch_size={run.train.batch_size}, train.accumulate={run.train.accumulate}"
        raise InputError(f"{given}: {started} {config.train.clips_per_step} clips per step; expected the same product")


def _fields(sections: dict[str, Any]) -> dict[str, Any]:
    """Map the full name of every field that is compared, such as `lora.rank`, to its value."""
    return {
        f"{name}.{field}": value
        for name, part in sections.items()
        if name != "sampling"
        for field, value in part.items()
    }
