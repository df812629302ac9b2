"""Fixtures of the planning's tests."""

import pytest
from helpers.plans import TINY, parse_run


@pytest.fixture
def tiny_file(tmp_path):
    """The configuration of a tiny model."""
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture
def tiny_run(tiny_file):
    """A run of the tiny model: (TrainPlan or SamplePlan, *options) -> run."""
    return lambda kind, *fields: parse_run(kind, tiny_file, *fields)
