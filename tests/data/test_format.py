"""The files of prepared clips: what is written is read back, always with the same bytes."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.records import make_records, read_dataset, same, write_dataset

from tfm_jax.data import format as files
from tfm_jax.data.format import Record, read_index, read_manifest, write_shard
from tfm_jax.errors import InputError


def stored(records: list[Record], dtype: np.dtype | type) -> list[Record]:
    return [record._replace(latents=record.latents.astype(dtype), text=record.text.astype(dtype)) for record in records]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tfds_reads_records_of_several_sizes(tmp_path, dtype):
    written = stored(make_records(7), dtype)
    written[4] = written[4]._replace(latents=written[4].latents[:2, :, :3])
    write_dataset(tmp_path / "latents", written)
    found = read_dataset(tmp_path / "latents")
    assert len(found) == 7
    for ours, theirs in zip(written, found, strict=True):
        assert same(ours, theirs)
        assert ours.latents.dtype == theirs.latents.dtype
        assert ours.fingerprint == theirs.fingerprint
    entries = read_index(tmp_path / "latents")
    assert [entry.latents for entry in entries] == [record.latents.shape for record in written]
    assert [entry.tokens for entry in entries] == [len(record.text) for record in written]
    assert [entry.fingerprint for entry in entries] == [record.fingerprint for record in written]
    manifest = read_manifest(tmp_path / "latents")
    assert manifest.dtype == np.dtype(dtype).name
    assert [shard.records for shard in manifest.shards] == [3, 3, 1]


def test_a_shard_without_records(tmp_path):
    records = make_records(2)
    parts = [records[:1], [], records[1:]]
    names = [files.shard_name(number, 3) for number in range(3)]
    shards = [write_shard(tmp_path / name, part)[0] for name, part in zip(names, parts, strict=True)]
    files.write_description(tmp_path, "float32", 16, 24, shards)
    assert [same(a, b) for a, b in zip(records, read_dataset(tmp_path), strict=True)] == [True, True]
    assert tfds.builder_from_directory(tmp_path).info.splits["train"].shard_lengths == [1, 0, 1]


def test_the_bytes_are_always_the_same(tmp_path):
    """In other processes too, where Python orders sets differently."""
    known = write_shard(tmp_path / "a", make_records(3))[0].sha256
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from helpers.records import make_records\n"
        "from tfm_jax.data.format import write_shard\n"
        "print(write_shard(Path(sys.argv[1]), make_records(3))[0].sha256, 'tensorflow' in sys.modules)\n"
    )
    for number in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / str(number))],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": str(number)},
            capture_output=True,
            text=True,
        )
        assert done.stdout == f"{known} False\n", done.stderr


@pytest.mark.parametrize("field", ["latents", "text", "prompt", "video"])
def test_the_fingerprint_covers_every_field(field):
    record = make_records(2)[1]
    other = {"latents": -record.latents, "text": record.text[::-1], "prompt": "x", "video": "x"}[field]
    assert record._replace(**{field: other}).fingerprint != record.fingerprint
    # A fixed value: if it changed, all data would have to be prepared again.
    assert record.fingerprint == "9f0b8bad84947f96"


@pytest.mark.parametrize("field", ["latents", "text"])
def test_values_that_are_not_finite(tmp_path, field):
    record = make_records(1)[0]
    getattr(record, field).flat[3] = np.nan
    with pytest.raises(InputError, match=r"clip 0.mp4: the latents or the text embedding are not finite"):
        write_shard(tmp_path / "shard", [record])
    assert not list(tmp_path.iterdir())


def test_an_error_between_records_leaves_nothing(tmp_path):
    """It is the error that is raised, even if closing the file fails as well."""

    def records():
        yield make_records(1)[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "shard", records())
    assert not list(tmp_path.iterdir())


DAMAGED_MANIFESTS = {
    "empty": (lambda values: "", "cannot be used"),
    "cut": (lambda values: json.dumps(values)[:50], "cannot be used"),
    "a list": (lambda values: "[]", "cannot be used"),
    "another version": (lambda values: json.dumps(values | {"version": 2}), "version: Input should be 1"),
    "unknown dtype": (lambda values: json.dumps(values | {"dtype": "int8"}), "dtype: Input should be"),
    "more": (lambda values: json.dumps(values | {"more": 1}), "more: Extra inputs"),
    "less": (lambda values: json.dumps({k: v for k, v in values.items() if k != "clips"}), "clips: Field required"),
}


@pytest.mark.parametrize("name", DAMAGED_MANIFESTS)
def test_damaged_manifests(tmp_path, name):
    write_dataset(tmp_path / "latents", make_records(1))
    file = tmp_path / "latents" / "manifest.json"
    change, message = DAMAGED_MANIFESTS[name]
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(file.parent)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(InputError, match="no such file; prepare the data again"):
        read_manifest(file.parent)


@pytest.mark.parametrize("line", ["", "{}", "[1]", '{"video": 1}', '{"video": "a', "\xff"])
def test_damaged_indexes(tmp_path, line):
    write_dataset(tmp_path / "latents", make_records(2))
    file = tmp_path / "latents" / "index.jsonl"
    first, _ = file.read_text().splitlines()
    file.write_text(f"{first}\n{line}\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"index.jsonl:2: is not the line of a record; prepare the data again"):
        read_index(file.parent)


def test_names(tmp_path: Path):
    assert files.shard_name(3, 12) == "tfm_clips-train.array_record-00003-of-00012"
