"""A folder of prepared clips in three shards."""

import pytest


@pytest.fixture
def small_shards(monkeypatch):
    """Make shards of three records each."""
    from helpers.records import RECORD_BYTES  # not above: pytest must first install the type checks of our package

    from tfm_jax.data import records

    monkeypatch.setattr(records, "SHARD_BYTES", 3 * RECORD_BYTES + 10)


@pytest.fixture
def dataset(tmp_path, small_shards):
    from helpers.records import write_records

    write_records(tmp_path / "latents")
    return tmp_path / "latents"
