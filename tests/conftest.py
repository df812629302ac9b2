"""Tests run on the CPU, in plain float32."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import compiling

# Nothing above imports JAX, which reads these variables once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
compiling.compile_fast()

torch.set_num_threads(1)

# A shell makes what it starts in the background ignore Ctrl-C, and so the programs that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "test_14b.py",
    "test_sharding.py",
    "test_processes.py",
    "test_kills.py",
    "test_training.py",
    "test_programs.py",
)
"""The files that start first, so that no process of pytest-xdist is left alone with one of them at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a program as its console command does: (name, *arguments) -> Outcome."""
    from helpers.tiny_world import (  # not above: pytest first has to prepare the type checks of our package
        Outcome,
        execute,
    )

    from tfm_jax.cli import command

    def run(name: str, *arguments: str | Path) -> "Outcome":
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            command.run(partial(execute, name))
        except SystemExit as done:
            code = done.code
        return Outcome(code, *capsys.readouterr())

    return run
