"""Reads configurations from a command line, as a program does."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from tfm_jax.cli import command
from tfm_jax.config import Config, section

T = TypeVar("T")

TEXT = """\
model: {path: weights, dim: 96, ffn_dim: 256, heads: 4, layers: 4, dtype: float32}
clip: {frames: 17, height: 64, width: 48}
data: {source: clips, path: latents}
lora:
  rank: 8
  targets: [q, k]
optimizer: {learning_rate: 1e-3}
train: {output: run, steps: 200}
sampling: {output: samples}
"""
"""A small configuration with all required fields."""


@functools.cache
def options_with(kind: type) -> type:
    """Return the options class of a program with `--config` and the sections of the dataclass `kind`."""
    return section(type("Options", (), {"__annotations__": {"config": Path, "run": kind}}))


def configured(kind: type[T], argv: Sequence[str]) -> T:
    """Read the sections of the dataclass `kind` from `--config FILE` and `--section.field=value` arguments."""
    return command.parse(options_with(kind), argv, "program", "About it.").options().run


def read(file: Path, *options: str, kind: type = Config) -> Any:
    """Read the sections of the dataclass `kind` from a file and options."""
    return configured(kind, ["--config", str(file), *options])


def write_config(folder: Path) -> Path:
    """Write TEXT to config.yaml."""
    file = folder / "config.yaml"
    file.write_text(TEXT)
    return file
