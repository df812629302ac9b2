"""Configurations read as a program reads them, from a command line."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tfm_jax.cli import command
from tfm_jax.config import section

T = TypeVar("T")


@functools.cache
def options_with(kind: type) -> type:
    """The options of a program with `--config` and the sections of `kind`."""
    return section(type("Options", (), {"__annotations__": {"config": Path, "run": kind}}))


def configured(kind: type[T], argv: Sequence[str]) -> T:
    """The sections of `kind` from `--config FILE` and `--section.field=value` arguments."""
    return command.parse(options_with(kind), argv, "program", "About it.").options().run
