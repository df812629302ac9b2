"""From metadata.csv to batches: the table, the records on disk, the order of training."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tfm_jax import video
from tfm_jax.config import ClipConfig, DataConfig, ModelConfig
from tfm_jax.data import prepare as prepare_module
from tfm_jax.data import records as records_module
from tfm_jax.data.batches import Batches
from tfm_jax.data.metadata import read_metadata
from tfm_jax.data.prepare import Prepared, PrepareRun, prepare
from tfm_jax.data.records import Record, Records, RecordWriter, open_records
from tfm_jax.errors import InputError, Terminated

FACTS = {"model": "weights/wan", "frames": 17, "fps": 16.0}
SHAPE, TEXT_DIM = (5, 4, 6, 16), 24


# --- metadata.csv ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips" / "sub").mkdir(parents=True)
    for name in ("a.mp4", "b c.mp4", "sub/d.mp4"):
        (tmp_path / "clips" / name).touch()
    (tmp_path / "outside.mp4").touch()
    return tmp_path / "clips"


def table(folder: Path, text: str | bytes) -> Path:
    (folder / "metadata.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_rows(folder):
    text = 'video,prompt\na.mp4,a cat\n\nb c.mp4,"one, ""two""\nthree 猫 🐈"\r\nsub/d.mp4,\na.mp4,a dog\n'
    rows = read_metadata(table(folder, text))
    assert [(row.video, row.prompt, row.line) for row in rows] == [
        ("a.mp4", "a cat", 2),
        ("b c.mp4", 'one, "two"\nthree 猫 🐈', 4),
        ("sub/d.mp4", "", 6),
        ("a.mp4", "a dog", 7),
    ]
    assert [row.path for row in rows] == [folder / row.video for row in rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_mark_other_columns_and_column_order(folder, encoding):
    text = "prompt,video,height\na cat,a.mp4,480\n".encode(encoding)
    assert [(row.video, row.prompt) for row in read_metadata(table(folder, text))] == [("a.mp4", "a cat")]


def test_a_long_caption_is_read(folder):
    caption = "very " * 20_000
    assert read_metadata(table(folder, f"video,prompt\na.mp4,{caption}\n"))[0].prompt == caption


BAD_TABLES = {
    "no prompt column": ("video,caption\na.mp4,x\n", r"metadata.csv:1: 0 columns 'prompt' among 'video', 'caption'"),
    "no video column": ("file,prompt\na.mp4,x\n", r"metadata.csv:1: 0 columns 'video' among 'file', 'prompt'"),
    "two prompt columns": ("video,prompt,prompt\na.mp4,x,y\n", r":1: 2 columns 'prompt'"),
    "no header": ("a.mp4,a cat\n", r":1: 0 columns 'video' among 'a.mp4', 'a cat'; expected .*video,prompt"),
    "semicolons": ("video;prompt\na.mp4;a cat\n", r":1: 0 columns 'video' among 'video;prompt'"),
    "empty file": ("", r"metadata.csv: no rows"),
    "header only": ("video,prompt\n\n", r"metadata.csv: no rows; expected a row for every clip"),
    "comma not quoted": ("video,prompt\na.mp4,a cat, black\n", r":2: 3 fields; expected 2 .*quote"),
    "field missing": ("video,prompt\na.mp4\n", r":2: 1 field; expected 2"),
    "open quote": ('video,prompt\na.mp4,x\nb c.mp4,"y\n', r"metadata.csv:3: unexpected end of data"),
    "text behind a quote": ('video,prompt\na.mp4,"x"y\n', r"metadata.csv:2: .*expected comma-separated values"),
    "field too long": (f"video,prompt\na.mp4,{'x' * 140_000}\n", r"metadata.csv:2: field larger than"),
    "not UTF-8": (b"video,prompt\na.mp4,caf\xe9\n", r"metadata.csv: byte \d+ is not UTF-8"),
    "same row twice": ("video,prompt\na.mp4,x\n\n./a.mp4,x\n", r":4: the same video and prompt as line 2"),
    "missing video": ("video,prompt\na.mp4,x\nz.mp4,y\n", r":3: video='z.mp4': no such file; expected a video in"),
    "a folder": ("video,prompt\nsub,y\n", r":2: video='sub': no such file"),
    "empty video": ("video,prompt\n,y\n", r":2: video='': empty; expected a path relative"),
    "blank video": ("video,prompt\n  ,y\n", r":2: video='  ': empty"),
    "URL": ("video,prompt\nhttps://example.org/a.mp4,y\n", r":2: video='https://example.org/a.mp4': a URL; .*download"),
    "file URL": ("video,prompt\nfile:///etc/passwd,y\n", r":2: video='file:///etc/passwd': a URL"),
    "other protocol": ("video,prompt\nconcat:a.mp4|a.mp4,y\n", r":2: video='concat:a.mp4\|a.mp4': no such file"),
    "absolute": ("video,prompt\n/etc/passwd,y\n", r":2: video='/etc/passwd': an absolute path"),
    "drive letter": ("video,prompt\nC:\\a.mp4,y\n", r"an absolute path"),
    "parent": ("video,prompt\n../outside.mp4,y\n", r":2: video='../outside.mp4': leads out of the folder"),
    "hidden parent": ("video,prompt\nsub/../../outside.mp4,y\n", r"leads out of the folder"),
    "NUL": (b"video,prompt\na.mp4\0.txt,y\n", r":2: video='a.mp4\\x00.txt': has a NUL"),
    "too long a name": (f"video,prompt\n{'x' * 300}.mp4,y\n", r":2: video='x*\.\.\.': File name too long"),
    "line break in a name": ('video,prompt\n"a\nb",y\n', r":2: video='a\\nb': no such file"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(folder, name):
    text, message = BAD_TABLES[name]
    with pytest.raises(InputError, match=message) as caught:
        read_metadata(table(folder, text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_all_wrong_rows_are_reported_at_once(folder):
    text = "video,prompt\nz.mp4,x\na.mp4,x\n../b.mp4,x\na.mp4,x\nb c.mp4\n"
    with pytest.raises(InputError) as caught:
        read_metadata(table(folder, text))
    assert str(caught.value) == (
        f"{folder}/metadata.csv: 4 rows are wrong; line 2: video='z.mp4': no such file; expected a video in {folder}; "
        "line 4: video='../b.mp4': leads out of the folder; expected a path relative to the folder of metadata.csv; "
        "line 5: the same video and prompt as line 3; expected one row; and 1 more"
    )


def test_links_that_go_round_in_a_circle(folder):
    (folder / "loop.mp4").symlink_to("pool.mp4")
    (folder / "pool.mp4").symlink_to("loop.mp4")
    (folder / "self").symlink_to("self")
    for name in ("loop.mp4", "self/a.mp4"):
        with pytest.raises(InputError, match=f"metadata.csv:2: video='{name}': no such file"):
            read_metadata(table(folder, f"video,prompt\n{name},y\n"))
    with pytest.raises(InputError, match=r"metadata.csv: no such file"):
        read_metadata(folder / "self")


def test_no_table(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"metadata.csv: no such file; expected a table with the columns video"):
            read_metadata(folder)


def test_links(folder):
    (folder / "in.mp4").symlink_to(folder / "a.mp4")
    (folder / "out.mp4").symlink_to(folder.parent / "outside.mp4")
    assert read_metadata(table(folder, "video,prompt\nin.mp4,y\n"))[0].path == folder / "in.mp4"
    with pytest.raises(InputError, match=r"video='out.mp4': leads out of the folder"):
        read_metadata(table(folder, "video,prompt\nout.mp4,y\n"))


def test_a_folder_that_is_a_link_itself(folder, monkeypatch):
    table(folder, "video,prompt\na.mp4,y\n")
    (folder.parent / "link").symlink_to(folder)
    assert read_metadata(folder.parent / "link")[0].video == "a.mp4"
    monkeypatch.chdir(folder)
    assert read_metadata(Path("."))[0].video == "a.mp4"


# --- Records ---------------------------------------------------------------------------------------------------------


def make_records(count: int) -> list[Record]:
    rng = np.random.default_rng(0)
    return [
        Record(
            rng.normal(size=SHAPE).astype(np.float32),
            rng.normal(size=(1 + 3 * n, TEXT_DIM)).astype(np.float32),
            f"prompt {n}, 猫\0",
            f"clip {n}.mp4",
        )
        for n in range(count)
    ]


def write(folder: Path, count: int = 7) -> list[Record]:
    written = make_records(count)
    with RecordWriter(folder, FACTS) as writer:
        for record in written:
            writer.write(record)
    return written


def same(a: Record, b: Record) -> bool:
    return np.array_equal(a.latents, b.latents) and np.array_equal(a.text, b.text) and a[2:] == b[2:]


@pytest.fixture
def small_shards(monkeypatch):
    """Three records a shard."""
    size = 4 * (int(np.prod(SHAPE)) + records_module.TEXT_LENGTH * TEXT_DIM)
    monkeypatch.setattr(records_module, "SHARD_BYTES", 3 * size + 10)


@pytest.fixture
def dataset(tmp_path, small_shards):
    write(tmp_path / "latents")
    return tmp_path / "latents"


def test_records_round_trip(tmp_path, small_shards):
    written = write(tmp_path / "made" / "here")
    records = open_records(tmp_path / "made" / "here")
    assert len(records) == 7
    assert records.metadata == FACTS
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
    """In a process of its own: nobody else can have imported it."""
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
    write(tmp_path / "latents")
    assert "latents: already exists and is not empty" in refused_writer(tmp_path / "latents")
    (tmp_path / "file").write_text("x")
    assert "file: a file; expected a directory" in refused_writer(tmp_path / "file")
    assert len(open_records(tmp_path / "latents")) == 7
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert len(open_records(tmp_path / "empty")) == 7


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(open_records(tmp_path / "disk" / "empty")) == 7


def test_folders_that_cannot_be_renamed_to(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("", ".", "/", ".."):
        assert refused_writer(Path(path)).startswith(f"data.path={Path(path)}: expected the path of a folder")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    assert "data.path=disk: a mount point; expected a folder inside it" in refused_writer(Path("disk"))
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_two_writers(tmp_path):
    with RecordWriter(tmp_path / "latents", {}) as writer:
        writer.write(make_records(1)[0])
        assert "latents: another run is preparing it" in refused_writer(tmp_path / "latents")
    assert len(open_records(tmp_path / "latents")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_what_a_killed_run_left_is_replaced(tmp_path, small_shards, capsys):
    with RecordWriter(tmp_path / "latents", FACTS) as writer:
        for record in make_records(5):
            writer.write(record)
        writer.reject("x.mp4", 7, "too short")
        shutil.copytree(writer.partial, tmp_path / "killed.partial")
    written = write(tmp_path / "killed", 2)
    assert "killed.partial: a run ended before it was finished; its files are removed" in capsys.readouterr().out
    records = open_records(tmp_path / "killed")
    assert len(records) == 2
    assert same(records[1], written[1])
    assert not (tmp_path / "killed" / "rejected.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "latents"]


def test_a_partial_folder_of_somebody_else_is_kept(tmp_path):
    (tmp_path / "latents.partial").mkdir()
    (tmp_path / "latents.partial" / "thesis.txt").touch()
    assert "latents.partial: not made by this version of prepare_data.py" in refused_writer(tmp_path / "latents")
    assert [path.name for path in (tmp_path / "latents.partial").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated, ZeroDivisionError])
@pytest.mark.parametrize("count", [0, 2, 5])
def test_an_interruption_leaves_nothing(tmp_path, small_shards, error, count):
    with pytest.raises(error), RecordWriter(tmp_path / "latents", FACTS) as writer:  # noqa: PT012
        for record in make_records(count):
            writer.write(record)
        raise error
    assert not any(tmp_path.iterdir())
    write(tmp_path / "latents")


def test_the_first_error_is_the_one_that_is_raised(tmp_path, monkeypatch):
    """On a full disk closing the files fails as well."""

    def fail(self):
        raise RuntimeError("closing failed")

    monkeypatch.setattr(tfds.core.SequentialWriter, "close_all", fail)
    with pytest.raises(OSError, match="No space left"), RecordWriter(tmp_path / "latents", FACTS) as writer:  # noqa: PT012
        writer.write(make_records(1)[0])
        raise OSError(28, "No space left on device")
    assert not any(tmp_path.iterdir())


def test_no_clips(tmp_path):
    with pytest.raises(InputError, match="no clip to write"), RecordWriter(tmp_path / "latents", FACTS):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["latents", "text"])
def test_values_that_are_not_finite(tmp_path, field):
    record = make_records(1)[0]
    getattr(record, field).flat[3] = np.nan
    with (
        pytest.raises(InputError, match=r"clip 0.mp4: its latents or text are not finite"),
        RecordWriter(tmp_path / "latents", FACTS) as writer,
    ):
        writer.write(record)


def test_records_of_another_shape_are_refused(tmp_path):
    first, second = make_records(2)
    with pytest.raises(ValueError, match="latents"), RecordWriter(tmp_path / "x", FACTS) as writer:  # noqa: PT012
        writer.write(first)
        writer.write(second._replace(latents=second.latents[:3]))
    assert not any(tmp_path.iterdir())


def shard(dataset: Path, number: int = 1) -> Path:
    return sorted(dataset.glob("*array_record*"))[number]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


BAD_SHARDS = {
    "missing": (Path.unlink, r"array_record-00001: missing"),
    "empty": (lambda path: path.write_bytes(b""), r"array_record-00001: damaged"),
    "truncated": (truncate, r"array_record-00001: damaged"),
    "another": (lambda path: path.write_bytes(shard(path.parent, 2).read_bytes()), r"00001: 1 clips; expected 3"),
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
    path = shard(dataset)
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    records = open_records(dataset)
    assert same(records[0], make_records(1)[0])
    with pytest.raises(InputError, match=r"latents: clip 3 is damaged; prepare the data again") as caught:
        records[3]
    assert "\n" not in str(caught.value)


def test_not_a_dataset(tmp_path, dataset):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=r"no dataset_info.json in it; expected a folder that prepare_data.py"):
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
    with pytest.raises(InputError, match="a dataset of caption, latents, text, video"):
        open_records(dataset)


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def test_swapped_shards_are_noticed(dataset):
    swap(shard(dataset, 0), shard(dataset, 1))
    records = open_records(dataset)
    message = r"latents: clip 4 \(clip 1.mp4\) is not what was prepared; prepare the data again"
    with pytest.raises(InputError, match=message):
        records[4]
    assert same(records[6], make_records(7)[6])


@pytest.mark.parametrize("field", ["latents", "text", "prompt", "video"])
def test_replaced_records_are_noticed(tmp_path, small_shards, field):
    """Records of the same lengths in files of the same names."""
    written = write(tmp_path / "latents")
    changed = {"latents": -written[4].latents, "text": written[4].text[::-1], "prompt": "prompt 5, 猫\0", "video": "x"}
    with RecordWriter(tmp_path / "other", FACTS) as writer:
        for number, record in enumerate(written):
            writer.write(record._replace(**{field: changed[field]}) if number == 4 else record)
    assert open_records(tmp_path / "latents").fingerprint != open_records(tmp_path / "other").fingerprint
    shutil.copy(shard(tmp_path / "other"), shard(tmp_path / "latents"))
    records = open_records(tmp_path / "latents")
    assert same(records[3], written[3])
    with pytest.raises(InputError, match=r"clip 4 \(.*\) is not what was prepared"):
        records[4]


def test_the_fingerprint_is_of_the_content(tmp_path, dataset):
    known = open_records(dataset).fingerprint
    shutil.copytree(dataset, tmp_path / "elsewhere" / "copy")
    assert open_records(tmp_path / "elsewhere" / "copy").fingerprint == known
    write(tmp_path / "again")
    assert open_records(tmp_path / "again").fingerprint == known
    info = dataset / "dataset_info.json"
    info.write_text(info.read_text().replace('"version": "1.0.0"', '"version": "1.0.1"'))
    assert open_records(dataset).fingerprint != known
    # Written down once: no run could be resumed if this changed.
    assert known == "ab63b9031d08ea54"


def test_data_of_an_earlier_version(dataset):
    file = dataset / "fingerprints.txt"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=r"fingerprints.txt: 6 lines for 7 clips; prepare the data again"):
        open_records(dataset)
    file.unlink()
    with pytest.raises(
        InputError, match=r"no fingerprints.txt in it, so an earlier version wrote it; prepare the data"
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
    """Whatever is changed: the same records are read, or it is refused."""
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


# --- Preparing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    """Five clips of 5 frames, and encoders that need no model."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(5):
        video.write_clip(folder / f"{n}.mp4", rng.integers(0, 255, (5, 16, 16, 3), np.uint8), 16)
    table(folder, "video,prompt\n" + "".join(f"{n}.mp4,prompt {n}\n" for n in range(5)))
    latents, text = make_records(1)[0][:2]

    def encoder(model):
        return lambda row, pixels: Record(latents + pixels.mean(dtype=np.float32), text, row.prompt, row.video)

    monkeypatch.setattr(prepare_module, "_encoder", encoder)
    return folder


def prepare_run(clips: Path, path: Path | None = None) -> PrepareRun:
    return PrepareRun(
        model=ModelConfig(path=Path("weights"), dim=96, ffn_dim=256, heads=4, layers=4),
        clip=ClipConfig(frames=5, height=16, width=16),
        data=DataConfig(source=clips, path=clips.with_name("latents") if path is None else path),
    )


def test_bad_clips_are_rejected_and_the_others_are_kept(clips, capsys):
    (clips / "2.mp4").write_bytes(b"not a video")
    video.write_clip(clips / "4.mp4", np.zeros((3, 16, 16, 3), np.uint8), 16)
    run = prepare_run(clips)
    assert prepare(run) == Prepared(written=3, rejected=2)
    records = open_records(run.data.path)
    assert [records[n].video for n in range(len(records))] == ["0.mp4", "1.mp4", "3.mp4"]
    rejected = [json.loads(line) for line in (run.data.path / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["video"]) for entry in rejected] == [(4, "2.mp4"), (6, "4.mp4")]
    assert f"{clips}/2.mp4: damaged or not a video" in rejected[0]["reason"]
    assert "expected enough for 5 frames" in rejected[1]["reason"]
    said = capsys.readouterr().err
    assert f"{clips}: 5 clips, 5 frames of 16 x 16 pixels at 16 frames a second; model weights; 1 x cpu" in said
    assert f"rejected: {clips}/2.mp4: damaged" in said
    assert len(tfds.builder_from_directory(run.data.path).as_data_source(split="train")) == 3


def test_a_clip_that_is_removed_meanwhile_is_rejected(clips, monkeypatch):
    encoder = prepare_module._encoder

    def removing(model):
        encode = encoder(model)
        return lambda row, pixels: ((clips / "1.mp4").unlink(missing_ok=True), encode(row, pixels))[1]

    monkeypatch.setattr(prepare_module, "_encoder", removing)
    run = prepare_run(clips)
    assert prepare(run) == (4, 1)
    assert "1.mp4: no such file" in (run.data.path / "rejected.jsonl").read_text()


def test_no_clip_can_be_used(clips):
    for file in clips.glob("*.mp4"):
        file.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"latents: none of the 5 clips can be used; the first: .*clips/0.mp4: damaged"
    ):
        prepare(prepare_run(clips))
    assert [path.name for path in clips.parent.iterdir()] == ["clips"]


def test_outputs_are_checked_before_the_model_is_loaded(clips, monkeypatch):
    monkeypatch.setattr(prepare_module, "_encoder", lambda model: pytest.fail("loaded"))
    for path, message in (
        (Path(""), "expected the path of a folder"),
        (Path("/"), "expected the path of a folder"),
        (clips, "already exists and is not empty"),
        (clips / "0.mp4", "a file; expected a directory"),
    ):
        with pytest.raises(InputError, match=f"data.path={path}: {message}"):
            prepare(prepare_run(clips, path))
    (clips / "3.mp4").unlink()
    with pytest.raises(InputError, match=r"metadata.csv:5: video='3.mp4': no such file"):
        prepare(prepare_run(clips))
    assert [path.name for path in clips.parent.iterdir()] == ["clips"]


def test_a_model_that_makes_no_numbers_is_no_rejected_clip(clips, monkeypatch):
    record = make_records(1)[0]
    record.latents[0] = np.inf
    monkeypatch.setattr(prepare_module, "_encoder", lambda model: lambda row, pixels: record._replace(video=row.video))
    with pytest.raises(InputError, match=r"0.mp4: its latents or text are not finite"):
        prepare(prepare_run(clips))
    assert [path.name for path in clips.parent.iterdir()] == ["clips"]


# --- Batches ---------------------------------------------------------------------------------------------------------


def take(batches: Batches, steps: int) -> list[list[int]]:
    return [batches.at(step)[1] for step in range(steps)]


def test_a_batch_has_its_clips_rows(dataset):
    records = open_records(dataset)
    batch, clips = Batches(records, 3, seed=5).at(4)
    assert batch.latents.shape == (3, *SHAPE)
    assert batch.text.shape == (3, 512, TEXT_DIM)
    assert batch.latents.dtype == batch.text.dtype == np.float32
    for latents, text, clip in zip(*batch, clips, strict=True):
        record = records[clip]
        assert np.array_equal(latents, record.latents)
        assert np.array_equal(text[: len(record.text)], record.text)
        assert not text[len(record.text) :].any()


def test_the_order_is_a_function_of_seed_and_step(dataset):
    records = open_records(dataset)
    order = take(Batches(records, 2, seed=5), 12)
    again = Batches(open_records(dataset), 2, seed=5)
    assert [again.at(step)[1] for step in reversed(range(12))] == order[::-1]
    assert take(Batches(records, 2, seed=6), 12) != order
    # Written down once: with a grain that shuffles differently, no old run could be resumed.
    assert order[:7] == [[3, 2], [4, 5], [1, 0], [6, 3], [6, 1], [5, 2], [0, 4]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_every_epoch_has_every_clip_once(dataset, batch_size):
    """Also where an epoch ends within a batch."""
    order = list(itertools.chain(*take(Batches(open_records(dataset), batch_size, seed=0), 21)))
    epochs = [order[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_processes_share_the_batch(dataset):
    records = open_records(dataset)
    everything = Batches(records, 6, seed=1)
    for step in range(3):
        whole, clips = everything.at(step)
        for rows in ([0, 1, 2], [1, 4], [5]):
            part, known = Batches(records, 6, seed=1, rows=rows).at(step)
            assert known == clips
            assert np.array_equal(part.latents, whole.latents[rows])
            assert np.array_equal(part.text, whole.text[rows])


def test_only_the_rows_of_the_process_are_read(dataset, monkeypatch):
    records = open_records(dataset)
    read, get = [], Records.__getitem__
    monkeypatch.setattr(Records, "__getitem__", lambda self, clip: (read.append(clip), get(self, clip))[1])
    _, clips = Batches(records, 6, seed=1, rows=[1, 4]).at(2)
    assert read == [clips[1], clips[4]]


@pytest.mark.parametrize("start", [0, 1, 1000])
def test_iterating_equals_asking(dataset, start):
    records = open_records(dataset)
    for batches in (Batches(records, 4, seed=2), Batches(records, 4, seed=2, rows=[2, 3])):
        seen = list(itertools.islice(batches.iterate(start), 9))
        assert [step for step, _, _ in seen] == list(range(start, start + 9))
        for step, batch, clips in seen:
            expected, expected_clips = batches.at(step)
            assert clips == expected_clips
            assert np.array_equal(batch.latents, expected.latents)
            assert np.array_equal(batch.text, expected.text)


def test_iterating_reads_ahead(dataset):
    """While a step computes, the next batches are read; but not without bound."""
    batches = Batches(open_records(dataset), 2, seed=2)
    asked: list[int] = []
    at = batches.at
    batches.at = lambda step: (asked.append(step), at(step))[1]
    iterator = batches.iterate(10)
    next(iterator)
    for _ in range(200):
        if len(asked) >= 4:
            break
        time.sleep(0.01)
    assert 4 <= len(asked) <= 8


def test_damage_reaches_the_training_loop_as_it_is(dataset):
    batches = Batches(open_records(dataset), 7, seed=2)
    path = shard(dataset)
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        next(batches.iterate())


def test_a_batch_with_more_rows_than_clips(dataset):
    records = open_records(dataset)
    with pytest.raises(
        InputError, match=r"train.batch_size=8: .*latents has only 7 clips; expected a batch size of at most 7"
    ):
        Batches(records, 8, seed=0)
