"""metadata.csv: what is read, and the tables and paths that are refused."""

from pathlib import Path

import pytest

from tfm_jax.data.metadata import read_metadata
from tfm_jax.errors import InputError


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
    assert [(row.video, row.prompt, row.origin.value) for row in rows] == [
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
    "same row twice": ("video,prompt\na.mp4,x\n\n./a.mp4,x\n", r":4: repeats the video and prompt of line 2"),
    "empty video": ("video,prompt\n,y\n", r":2: video='': is empty; expected a path relative"),
    "blank video": ("video,prompt\n  ,y\n", r":2: video='  ': is empty"),
    "URL": (
        "video,prompt\nhttps://example.org/a.mp4,y\n",
        r":2: video='https://example.org/a.mp4': is a URL; .*download",
    ),
    "file URL": ("video,prompt\nfile:///etc/passwd,y\n", r":2: video='file:///etc/passwd': is a URL"),
    "absolute": ("video,prompt\n/etc/passwd,y\n", r":2: video='/etc/passwd': is an absolute path"),
    "drive letter": ("video,prompt\nC:\\a.mp4,y\n", r"an absolute path"),
    "parent": ("video,prompt\n../outside.mp4,y\n", r":2: video='../outside.mp4': is outside the folder"),
    "hidden parent": ("video,prompt\nsub/../../outside.mp4,y\n", r"is outside the folder"),
    "NUL": (b"video,prompt\na.mp4\0.txt,y\n", r":2: video='a.mp4\\x00.txt': contains a NUL"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(folder, name):
    text, message = BAD_TABLES[name]
    with pytest.raises(InputError, match=message) as caught:
        read_metadata(table(folder, text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_all_bad_rows_are_reported_at_once(folder):
    text = "video,prompt\n/z.mp4,x\na.mp4,x\n../b.mp4,x\na.mp4,x\nb c.mp4\n"
    with pytest.raises(InputError) as caught:
        read_metadata(table(folder, text))
    assert str(caught.value) == (
        f"{folder}/metadata.csv: 4 bad rows; line 2: video='/z.mp4': is an absolute path; expected a path relative to "
        f"{folder} (tfm-prepare accepts it with data.absolute_paths=true); "
        f"line 4: video='../b.mp4': is outside the folder; expected a path relative to {folder}; "
        "line 5: repeats the video and prompt of line 3; expected each pair once; and 1 more"
    )


@pytest.mark.parametrize("name", ["z.mp4", "sub", "concat:a.mp4|a.mp4", "x" * 300 + ".mp4", "a\nb"])
def test_files_that_do_not_exist_are_found_out_later(folder, name):
    assert read_metadata(table(folder, f'video,prompt\n"{name}",y\na.mp4,x\n'))[0].path == folder / name


def test_circular_links(folder):
    (folder / "loop.mp4").symlink_to("pool.mp4")
    (folder / "pool.mp4").symlink_to("loop.mp4")
    (folder / "self").symlink_to("self")
    for name in ("loop.mp4", "self/a.mp4"):
        assert read_metadata(table(folder, f"video,prompt\n{name},y\n"))[0].path == folder / name
    with pytest.raises(InputError, match=r"self: no such file; expected a list of clips"):
        read_metadata(folder / "self")


def test_links(folder):
    (folder / "in.mp4").symlink_to(folder / "a.mp4")
    (folder / "out.mp4").symlink_to(folder.parent / "outside.mp4")
    assert read_metadata(table(folder, "video,prompt\nin.mp4,y\n"))[0].path == folder / "in.mp4"
    with pytest.raises(InputError, match=r"video='out.mp4': is outside the folder"):
        read_metadata(table(folder, "video,prompt\nout.mp4,y\n"))


def test_a_folder_that_is_a_link_itself(folder, monkeypatch):
    table(folder, "video,prompt\na.mp4,y\n")
    (folder.parent / "link").symlink_to(folder)
    assert read_metadata(folder.parent / "link")[0].video == "a.mp4"
    monkeypatch.chdir(folder)
    assert read_metadata(Path("."))[0].video == "a.mp4"
