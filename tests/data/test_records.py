"""Prepared clips on disk: what is written is read back, and damage of any kind is noticed."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.records import CLIP, SHAPE, TEXT_DIM, flip_a_bit, make_records, same, shard, write_dataset, write_records
from safetensors.numpy import save_file

from tfm_jax.arrays import DTYPES
from tfm_jax.data import format as files
from tfm_jax.data.records import open_records
from tfm_jax.errors import InputError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_records_round_trip(tmp_path, dtype):
    """Clips of two sizes, some in the same shard."""
    written = make_records(7, (SHAPE, (2, 6, 4, 16)), dtype)
    write_dataset(tmp_path / "latents", written, encoders={"vae": "0123"})
    records = open_records(tmp_path / "latents")
    assert len(records) == 7
    assert (records.channels, records.text_dim) == (SHAPE[-1], TEXT_DIM)
    assert (records.manifest.clip, records.manifest.encoders) == (CLIP, {"vae": "0123"})
    assert [(entry.video, entry.latents, entry.tokens) for entry in records.index] == [
        (record.video, record.latents.shape, len(record.text)) for record in written
    ]
    assert all(same(records[i], written[i]) for i in (6, 0, 3, 1, 2, 5, 4))
    assert records[0].latents.dtype == records[0].text.dtype == records.empty_prompt.dtype == DTYPES[dtype]
    for outside in (-1, 7):
        with pytest.raises(IndexError):
            records[outside]


def test_empty_shards_are_skipped(tmp_path):
    """A shard is empty if all of its clips were rejected."""
    written = make_records(4)
    write_dataset(tmp_path / "latents", written, per_shard=2)
    folder = tmp_path / "latents"
    groups = [[], written[:2], [], written[2:], []]
    for file in folder.glob("*.array_record*"):
        file.unlink()
    shards = [files.write_shard(folder / files.shard_name(n, 5), group)[0] for n, group in enumerate(groups)]
    files.write_manifest(folder, files.read_manifest(folder).model_copy(update={"shards": shards}))
    records = open_records(folder)
    assert all(same(records[i], written[i]) for i in range(4))


def test_tfds_opens_them(dataset):
    source = tfds.builder_from_directory(dataset).as_data_source(split="train")
    assert len(source) == 7
    for fields, record in zip(source, make_records(7), strict=True):
        assert np.array_equal(fields["latents"], record.latents)
        assert np.array_equal(fields["text"], record.text)
        assert (fields["prompt"].decode(), fields["video"].decode()) == (record.prompt, record.video)


def test_tensorflow_is_not_needed(dataset):
    """Checked in a new process, into which nothing else has imported it."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tfm_jax.data.records import open_records\n"
        "print(open_records(Path(sys.argv[1]))[5].video, 'tensorflow' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(dataset)], capture_output=True, text=True, check=True)
    assert result.stdout == "clip 5.mp4 False\n"


# --- Damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def merge(path: Path) -> None:
    """Put all clips into one shard, and let the manifest say that it has its size."""
    manifest, copy = path.with_name("manifest.json"), path.with_name("copy")
    write_dataset(copy, make_records(7), per_shard=7)
    path.write_bytes(shard(copy, 0).read_bytes())
    values = json.loads(manifest.read_text())
    values["shards"][1]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(values))


BAD_SHARDS = {
    "missing": (Path.unlink, r"array_record-00001-of-00003: is missing"),
    "empty": (lambda path: path.write_bytes(b""), r"array_record-00001-of-00003: is damaged \(0 bytes, not \d+\)"),
    "truncated": (truncate, r"array_record-00001-of-00003: is damaged \(\d+ bytes, not \d+\)"),
    "overwritten": (overwrite, r"array_record-00001-of-00003: is damaged"),
    "another": (merge, r"array_record-00001-of-00003: contains 7 clips, not 3"),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_bad_shards(dataset, name):
    damage, message = BAD_SHARDS[name]
    damage(shard(dataset))
    with pytest.raises(InputError, match=message) as caught:
        open_records(dataset)
    assert str(dataset) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_noticed(dataset):
    flip_a_bit(shard(dataset))
    records = open_records(dataset)
    assert same(records[0], make_records(1)[0])
    with pytest.raises(InputError, match=r"latents: clip 3 is damaged; prepare the data again") as caught:
        records[3]
    assert "\n" not in str(caught.value)


def test_not_prepared_clips(tmp_path, dataset):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=r"contains no manifest.json; expected a folder that tfm-prepare wrote"):
            open_records(folder)
    (dataset / "manifest.json").unlink()
    with pytest.raises(
        InputError, match=r"contains no manifest.json, so an earlier version wrote it; prepare the data again"
    ):
        open_records(dataset)


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def test_swapped_shards_are_noticed(tmp_path):
    """They have the same size and number of clips."""
    written = make_records(4)
    equal = [record._replace(text=written[0].text, video="0.mp4", prompt="") for record in written]
    write_dataset(tmp_path / "latents", equal, per_shard=2)
    swap(shard(tmp_path / "latents", 0), shard(tmp_path / "latents", 1))
    records = open_records(tmp_path / "latents")
    for number in range(4):
        message = rf"latents: clip {number} \(0.mp4\) differs from the one that was prepared; prepare the data again"
        with pytest.raises(InputError, match=message):
            records[number]


@pytest.mark.parametrize("field", ["latents", "text", "prompt", "video"])
def test_replaced_records_are_noticed(tmp_path, field):
    """The replaced records have the same lengths, in files with the same names."""
    written = write_records(tmp_path / "latents")
    changed = {"latents": -written[4].latents, "text": written[4].text[::-1], "prompt": "prompt 5, 猫\0", "video": "x"}
    other = [*written[:4], written[4]._replace(**{field: changed[field]}), *written[5:]]
    write_dataset(tmp_path / "other", other)
    assert open_records(tmp_path / "latents").fingerprint != open_records(tmp_path / "other").fingerprint
    records = open_records(tmp_path / "latents")
    shutil.copy(shard(tmp_path / "other"), shard(tmp_path / "latents"))
    assert same(records[3], written[3])
    with pytest.raises(InputError, match=r"clip 4 \(.*\) differs from the one that was prepared"):
        records[4]


def test_the_fingerprint_is_of_the_content(tmp_path, dataset):
    known = open_records(dataset).fingerprint
    shutil.copytree(dataset, tmp_path / "elsewhere" / "copy")
    assert open_records(tmp_path / "elsewhere" / "copy").fingerprint == known
    write_dataset(tmp_path / "again", make_records(7), per_shard=2)
    assert open_records(tmp_path / "again").fingerprint == known
    for name, options in (("clip", {"clip": {"frames": 5}}), ("encoders", {"encoders": {"vae": "0"}})):
        write_dataset(tmp_path / name, make_records(7), **options)
        assert open_records(tmp_path / name).fingerprint != known
    # A fixed value: if it changed, no existing run could be resumed.
    assert known == "b1e7d94860257658"


@pytest.mark.parametrize("lines", [0, 6, 8])
def test_an_index_of_another_length(dataset, lines):
    file = dataset / "index.jsonl"
    content = file.read_text().splitlines(keepends=True)
    file.write_text("".join((content * 2)[:lines]))
    with pytest.raises(InputError, match=rf"index.jsonl: contains {lines} lines for 7 clips; prepare the data again"):
        open_records(dataset)


def test_a_damaged_empty_prompt(dataset):
    file = dataset / "empty_prompt.safetensors"
    truncate_to = file.read_bytes()[:-1]
    for content, message in (
        (None, "is missing or damaged"),
        (truncate_to, "is missing or damaged"),
        ({"txt": np.ones((1, TEXT_DIM), np.float32)}, "is missing or damaged"),
        (
            {"text": np.ones((1, TEXT_DIM), np.float64)},
            r"text is float64 \[1, 24\]; expected float32 \[tokens, width\]",
        ),
        ({"text": np.ones((513, TEXT_DIM), np.float32)}, "text is .* at most 512 tokens"),
        ({"text": np.full((1, TEXT_DIM), np.nan, np.float32)}, "has a NaN or infinite value"),
    ):
        file.unlink(missing_ok=True)
        if isinstance(content, dict):
            save_file(content, file)
        elif content is not None:
            file.write_bytes(content)
        with pytest.raises(
            InputError, match=rf"empty_prompt.safetensors: {message}.*; prepare the data again"
        ) as caught:
            open_records(dataset)
        assert "\n" not in str(caught.value)


def test_damaged_descriptions(dataset):
    """Whatever is changed, either the same records are read or the folder is refused."""
    rng = random.Random(0)
    records = make_records(7)
    refusals = 0
    for name in ("manifest.json", "index.jsonl"):
        content = (dataset / name).read_bytes()
        for _ in range(80):
            place, damaged = rng.randrange(len(content)), bytearray(content)
            damaged[place : place + rng.randrange(3)] = bytes(
                rng.choices(b'0123456789"{}[],:xT-\0\xff', k=rng.randrange(3))
            )
            (dataset / name).write_bytes(damaged)
            try:
                found = open_records(dataset)
                assert all(same(found[number], record) for number, record in enumerate(records))
                assert len(found) == len(records)
            except InputError:
                refusals += 1
        (dataset / name).write_bytes(content)
    assert refusals > 80
