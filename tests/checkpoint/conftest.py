"""A run with two checkpoints, shared by the tests of checkpoints."""

import shutil
from pathlib import Path

import pytest

# The helpers import our package, so they are imported in the fixture: pytest has to prepare its type checks first.


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 1 and 2. A URL would have to encode the name of its folder."""
    from helpers.checkpoints import METADATA, state

    from tfm_jax.checkpoint import Checkpoints

    run = tmp_path_factory.mktemp("run") / "Ω 100% #1?"
    with Checkpoints(run / "checkpoints", max_to_keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), METADATA)
    return run


@pytest.fixture
def folder(two_steps, tmp_path) -> Path:
    """A copy of its folder of checkpoints."""
    return shutil.copytree(two_steps, tmp_path / two_steps.name) / "checkpoints"
