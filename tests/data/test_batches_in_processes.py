"""Batches in several processes: the clips and every byte are those that a single process reads."""

import json

import pytest
from helpers.launching import PATIENCE, Launcher
from helpers.records import SHAPE, make_records, write_dataset

READING = """
import hashlib, itertools, json, sys
from pathlib import Path
import jax, numpy as np
from tfm_jax import processes
from tfm_jax.config import MeshConfig
from tfm_jax.data.batches import Batches
from tfm_jax.data.order import is_held_out
from tfm_jax.data.records import open_records
from tfm_jax.sharding import make_mesh
folder, first, last, out = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
with processes.distributed():
    records = open_records(folder)
    clips = [number for number, entry in enumerate(records.index) if not is_held_out(entry.video, 0.3)]
    batches = Batches(records, 8, 3, make_mesh(MeshConfig(data=8)), 512, clips=clips, caption_dropout=0.4)
    found = {}
    for step, batch, numbers in itertools.islice(batches.iterate(first), last - first):
        found[step] = {"clips": numbers}
        for name, array in batches.place(batch)._asdict().items():
            for part in array.addressable_shards:
                digest = hashlib.sha256(np.asarray(part.data).tobytes()).hexdigest()
                found[step][f"{name} {part.index[0].start} {part.data.shape}"] = digest
    (out / f"{jax.process_index()}.json").write_text(json.dumps(found))
"""
"""Program that writes, for each step, the clips of the batch and a hash of every row on the devices of its process."""


@pytest.fixture
def launch():
    launcher = Launcher()
    yield launcher
    launcher.kill()


@pytest.mark.slow
def test_one_two_and_four_processes_agree(launch, tmp_path):
    """With two sizes, held-out clips and dropped captions; the four processes start later, as after a resume."""
    write_dataset(tmp_path / "latents", make_records(18, (SHAPE, SHAPE, (2, 6, 4, 16)), "bfloat16"))

    def read(count: int, first: int) -> dict[str, dict]:
        """Read the steps from `first` to 8 in `count` processes, and join what they found."""
        out = tmp_path / str(count)
        out.mkdir()
        started = launch(count, ["-c", READING, *map(str, (tmp_path / "latents", first, 8, out))])
        errors = [process.communicate(timeout=PATIENCE)[1] for process in started]
        assert [process.returncode for process in started] == [0] * count, errors
        parts = [json.loads((out / f"{number}.json").read_text()) for number in range(count)]
        assert all(len(part[step]) == 1 + 2 * 8 // count for part in parts for step in part)
        return {step: {key: value for part in parts for key, value in part[step].items()} for step in parts[0]}

    one = read(1, 0)
    assert list(one) == [str(step) for step in range(8)]
    assert len({next(key for key in found if key.startswith("latents 0")) for found in one.values()}) == 2
    assert read(2, 0) == one
    assert read(4, 5) == {step: one[step] for step in ("5", "6", "7")}
