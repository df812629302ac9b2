"""A folder of prepared clips in three shards."""

import numpy as np
import pytest
from helpers.records import SHAPE, TEXT_DIM, write_records

from tfm_jax.data import records as records_module


@pytest.fixture
def small_shards(monkeypatch):
    """Three records a shard."""
    size = 4 * (int(np.prod(SHAPE)) + records_module.TEXT_LENGTH * TEXT_DIM)
    monkeypatch.setattr(records_module, "SHARD_BYTES", 3 * size + 10)


@pytest.fixture
def dataset(tmp_path, small_shards):
    write_records(tmp_path / "latents")
    return tmp_path / "latents"
