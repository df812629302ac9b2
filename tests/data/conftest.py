"""A folder of prepared clips in three shards."""

import pytest


@pytest.fixture
def dataset(tmp_path):
    from helpers.records import write_records  # not above: pytest must first install the type checks of our package

    write_records(tmp_path / "latents")
    return tmp_path / "latents"
