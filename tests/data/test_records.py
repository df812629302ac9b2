"""Prepared clips on disk: what is written is read back, and damage of any kind is noticed."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.records import METADATA, flip_a_bit, make_records, same, shard, write_records

from tfm_jax.data.records import RecordWriter, open_records
from tfm_jax.errors import InputError, Terminated


def test_records_round_trip(tmp_path, small_shards):
    written = write_records(tmp_path / "made" / "here")
    records = open_records(tmp_path / "made" / "here")
    assert len(records) == 7
    assert records.metadata == METADATA
    assert all(same(records[i], written[i]) for i in (6, 0, 3, 1, 2, 5, 4))
    assert records[0].latents.dtype == records[0].text.dtype == np.float32
    for outside in (-1, 7):
        with pytest.raises(IndexError):
            records[outside]
    assert len(list((tmp_path / "made" / "here").glob("*array_record*"))) == 3
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["here"]


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
        "from tfm_jax.data.records import RecordWriter, open_records\n"
        "folder = Path(sys.argv[1]); records = open_records(folder)\n"
        "with RecordWriter(folder.with_name('copy'), records.metadata) as writer:\n"
        "    for i in range(len(records)): writer.write(records[i])\n"
        "print(len(open_records(folder.with_name('copy'))), 'tensorflow' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(dataset)], capture_output=True, text=True, check=True)
    assert result.stdout == "7 False\n"


def refused_writer(folder: Path) -> str:
    with pytest.raises(InputError) as caught, RecordWriter(folder, {}):
        pytest.fail("entered")
    return str(caught.value)


def test_nothing_is_overwritten(tmp_path):
    write_records(tmp_path / "latents")
    assert "latents: already exists and is not empty" in refused_writer(tmp_path / "latents")
    (tmp_path / "file").write_text("x")
    assert "file: is a file; expected a directory" in refused_writer(tmp_path / "file")
    assert len(open_records(tmp_path / "latents")) == 7
    (tmp_path / "empty").mkdir()
    write_records(tmp_path / "empty")
    assert len(open_records(tmp_path / "empty")) == 7


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
    write_records(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(open_records(tmp_path / "disk" / "empty")) == 7


def test_folders_that_cannot_be_renamed_to(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("", ".", "/", ".."):
        assert refused_writer(Path(path)).startswith(f"data.path={Path(path)}: expected the path of a folder")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    assert "data.path=disk: is a mount point; use a folder inside it, such as disk/latents" in refused_writer(
        Path("disk")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_two_writers(tmp_path):
    with RecordWriter(tmp_path / "latents", {}) as writer:
        writer.write(make_records(1)[0])
        assert "latents: is in use by another run" in refused_writer(tmp_path / "latents")
    assert len(open_records(tmp_path / "latents")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_what_a_killed_run_left_is_replaced(tmp_path, small_shards, capsys):
    with RecordWriter(tmp_path / "latents", METADATA) as writer:
        for record in make_records(5):
            writer.write(record)
        writer.reject("x.mp4", {"line": 7}, "too short")
        shutil.copytree(writer.partial, tmp_path / "killed.partial")
    written = write_records(tmp_path / "killed", 2)
    assert "killed.partial: removed the files of an unfinished run" in capsys.readouterr().out
    records = open_records(tmp_path / "killed")
    assert len(records) == 2
    assert same(records[1], written[1])
    assert not (tmp_path / "killed" / "rejected.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "latents"]


def test_a_partial_folder_of_somebody_else_is_kept(tmp_path):
    (tmp_path / "latents.partial").mkdir()
    (tmp_path / "latents.partial" / "thesis.txt").touch()
    assert "latents.partial: was not made by this version of tfm-prepare" in refused_writer(tmp_path / "latents")
    assert [path.name for path in (tmp_path / "latents.partial").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated, ZeroDivisionError])
@pytest.mark.parametrize("count", [0, 2, 5])
def test_an_interruption_leaves_nothing(tmp_path, small_shards, error, count):
    with pytest.raises(error), RecordWriter(tmp_path / "latents", METADATA) as writer:  # noqa: PT012
        for record in make_records(count):
            writer.write(record)
        raise error
    assert not any(tmp_path.iterdir())
    write_records(tmp_path / "latents")


def test_the_first_error_is_the_one_that_is_raised(tmp_path, monkeypatch):
    """On a full disk, closing the files fails as well."""

    def fail(self):
        raise RuntimeError("closing failed")

    monkeypatch.setattr(tfds.core.SequentialWriter, "close_all", fail)
    with pytest.raises(OSError, match="No space left"), RecordWriter(tmp_path / "latents", METADATA) as writer:  # noqa: PT012
        writer.write(make_records(1)[0])
        raise OSError(28, "No space left on device")
    assert not any(tmp_path.iterdir())


def test_no_clips(tmp_path):
    with pytest.raises(InputError, match="no clips were written"), RecordWriter(tmp_path / "latents", METADATA):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["latents", "text"])
def test_values_that_are_not_finite(tmp_path, field):
    record = make_records(1)[0]
    getattr(record, field).flat[3] = np.nan
    with (
        pytest.raises(InputError, match=r"clip 0.mp4: the latents or the text embedding are not finite"),
        RecordWriter(tmp_path / "latents", METADATA) as writer,
    ):
        writer.write(record)


def test_records_of_another_shape_are_refused(tmp_path):
    first, second = make_records(2)
    with pytest.raises(ValueError, match="latents"), RecordWriter(tmp_path / "x", METADATA) as writer:  # noqa: PT012
        writer.write(first)
        writer.write(second._replace(latents=second.latents[:3]))
    assert not any(tmp_path.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


BAD_SHARDS = {
    "missing": (Path.unlink, r"array_record-00001: is missing"),
    "empty": (lambda path: path.write_bytes(b""), r"array_record-00001: is damaged"),
    "truncated": (truncate, r"array_record-00001: is damaged"),
    "another": (lambda path: path.write_bytes(shard(path.parent, 2).read_bytes()), r"00001: contains 1 clips, not 3"),
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


def test_not_a_dataset(tmp_path, dataset):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=r"contains no dataset_info.json; expected a folder that tfm-prepare"):
            open_records(folder)
    for name in ("dataset_info.json", "features.json", "metadata.json"):
        content = (dataset / name).read_text()
        (dataset / name).write_text("{")
        with pytest.raises(InputError, match="latents: cannot be read") as caught:
            open_records(dataset)
        assert "\n" not in str(caught.value)
        (dataset / name).write_text(content)
    features = dataset / "features.json"
    features.write_text(features.read_text().replace('"prompt"', '"caption"'))
    with pytest.raises(InputError, match="a dataset with the fields caption, latents, text, video"):
        open_records(dataset)


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def test_swapped_shards_are_noticed(dataset):
    swap(shard(dataset, 0), shard(dataset, 1))
    records = open_records(dataset)
    message = r"latents: clip 4 \(clip 1.mp4\) differs from the one that was prepared; prepare the data again"
    with pytest.raises(InputError, match=message):
        records[4]
    assert same(records[6], make_records(7)[6])


@pytest.mark.parametrize("field", ["latents", "text", "prompt", "video"])
def test_replaced_records_are_noticed(tmp_path, small_shards, field):
    """The replaced records have the same lengths, in files with the same names."""
    written = write_records(tmp_path / "latents")
    changed = {"latents": -written[4].latents, "text": written[4].text[::-1], "prompt": "prompt 5, 猫\0", "video": "x"}
    with RecordWriter(tmp_path / "other", METADATA) as writer:
        for number, record in enumerate(written):
            writer.write(record._replace(**{field: changed[field]}) if number == 4 else record)
    assert open_records(tmp_path / "latents").fingerprint != open_records(tmp_path / "other").fingerprint
    shutil.copy(shard(tmp_path / "other"), shard(tmp_path / "latents"))
    records = open_records(tmp_path / "latents")
    assert same(records[3], written[3])
    with pytest.raises(InputError, match=r"clip 4 \(.*\) differs from the one that was prepared"):
        records[4]


def test_the_fingerprint_is_of_the_content(tmp_path, dataset):
    known = open_records(dataset).fingerprint
    shutil.copytree(dataset, tmp_path / "elsewhere" / "copy")
    assert open_records(tmp_path / "elsewhere" / "copy").fingerprint == known
    write_records(tmp_path / "again")
    assert open_records(tmp_path / "again").fingerprint == known
    info = dataset / "dataset_info.json"
    info.write_text(info.read_text().replace('"version": "1.0.0"', '"version": "1.0.1"'))
    assert open_records(dataset).fingerprint != known
    # A fixed value: if it changed, no existing run could be resumed.
    assert known == "ab63b9031d08ea54"


def test_data_of_an_earlier_version(dataset):
    file = dataset / "fingerprints.txt"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=r"fingerprints.txt: contains 6 lines for 7 clips; prepare the data again"):
        open_records(dataset)
    file.unlink()
    with pytest.raises(
        InputError, match=r"contains no fingerprints.txt, perhaps because an earlier version wrote it; prepare the data"
    ):
        open_records(dataset)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"6"', '"7"'),
        ('"6",', ""),
        ('"24"', '"12"'),
        ('"float32"', '"int32"'),
        ('"bytes"', '"zlib"'),
        ('"text": {}', '"text": {"encoder": "x"}'),
        ("text_feature.Text", "tensor_feature.Tensor"),
        ("FeaturesDict", "Sequence"),
    ],
)
def test_altered_features(dataset, old, new):
    file = dataset / "features.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError, match="prepare") as caught:
        open_records(dataset)[0]
    assert "\n" not in str(caught.value)


def test_damaged_descriptions(dataset):
    """Whatever is changed, either the same records are read or the folder is refused."""
    rng = random.Random(0)
    records = make_records(7)
    refusals = 0
    for name in ("dataset_info.json", "features.json", "metadata.json", "fingerprints.txt"):
        content = (dataset / name).read_bytes()
        for _ in range(40):
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
