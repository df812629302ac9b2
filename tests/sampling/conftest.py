"""A small random model, a run with it, and the noise of the rounds that a test samples."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The folder of a model with random weights; tests may add folders beside it."""
    from helpers.random_model import write_model  # not above: pytest must first install the type checks of our package
    from helpers.sampling_runs import PROMPTS

    path = tmp_path_factory.mktemp("sampling") / "model"
    write_model(path, PROMPTS)
    return path


@pytest.fixture(scope="session")
def finished(model) -> Path:
    """The folder of an uninterrupted run."""
    from helpers.sampling_runs import run_of

    from tfm_jax.sampling.pipeline import sample

    sample(run_of(model, model.parent / "finished"))
    return model.parent / "finished"


@pytest.fixture
def rounds(monkeypatch) -> list[np.ndarray]:
    """The noise of every round that is sampled during the test, without the first step, which only tests the model."""
    from tfm_jax.sampling import pipeline, sample_latents

    noises = []

    def record(transformer, noise, *arguments, until, **options):
        if until is None:
            noises.append(np.asarray(noise))
        return sample_latents(transformer, noise, *arguments, until=until, **options)

    monkeypatch.setattr(pipeline, "sample_latents", record)
    return noises
