"""A tiny model, prepared clips and a started run, shared by the tests of training."""

import shutil
from pathlib import Path

import pytest

# Helpers that import our package are imported in the fixtures: pytest has to prepare its type checks first.


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A transformer in the Diffusers layout."""
    from helpers.training_runs import CONFIG
    from helpers.wan_reference import reference_transformer

    folder = tmp_path_factory.mktemp("model")
    reference_transformer(CONFIG).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory) -> Path:
    """Twelve prepared clips."""
    from helpers.training_runs import write_latents

    return write_latents(tmp_path_factory.mktemp("data") / "latents", seed=0)


@pytest.fixture
def options(model_folder, latents, tmp_path) -> list[str]:
    """The command line of a run in `tmp_path / "run"`."""
    from helpers.training_runs import arguments

    return arguments(model_folder, latents, tmp_path)


@pytest.fixture(scope="module")
def two_steps(model_folder, latents, tmp_path_factory) -> Path:
    """The run after two of its steps."""
    from helpers.training_runs import arguments, start

    return start([*arguments(model_folder, latents, tmp_path_factory.mktemp("two_steps")), "--train.steps=2"])


@pytest.fixture
def stopped(two_steps, tmp_path) -> Path:
    """A copy of the run after two steps, in the folder of `options`."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))
