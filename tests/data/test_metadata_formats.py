"""Lists of clips other than metadata.csv: what is read, what is refused, and which list is chosen."""

import json
import os
from pathlib import Path

import pytest

from tfm_jax.data import metadata_formats
from tfm_jax.data.metadata import find_metadata, read_metadata
from tfm_jax.errors import InputError

A, B = {"video": "a.mp4", "prompt": "a cat"}, {"video": "sub/b.webm", "prompt": 'one, "two"\nthree 猫 🐈'}
ROWS = [("a.mp4", "a cat"), ("sub/b.webm", 'one, "two"\nthree 猫 🐈')]
BOM = "\ufeff"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips" / "sub").mkdir(parents=True)
    for name in ("a.mp4", "sub/b.webm"):
        (tmp_path / "clips" / name).touch()
    (tmp_path / "outside.mp4").touch()
    return tmp_path / "clips"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def lines(*values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def read(source: Path, **options) -> list[tuple[str, str]]:
    return [(clip.video, clip.prompt) for clip in read_metadata(source, **options)]


def refused(source: Path, match: str, **options) -> str:
    with pytest.raises(InputError, match=match) as caught:
        read_metadata(source, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


# --- JSON and JSONL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["", BOM])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_json(folder, mark, ascii_only):
    write(folder, "metadata.json", mark + json.dumps([A, {**B, "fps": [1, None]}], indent=2, ensure_ascii=ascii_only))
    clips = read_metadata(folder)
    assert [(clip.video, clip.prompt) for clip in clips] == ROWS
    assert [str(clip.origin) for clip in clips] == ["index 0", "index 1"]


@pytest.mark.parametrize("mark", ["", BOM])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_jsonl(folder, mark, end):
    content = mark + f"{json.dumps(A)}\n \n{json.dumps({**B, 'height': 480}, ensure_ascii=False)}".replace("\n", end)
    write(folder, "metadata.jsonl", content)
    clips = read_metadata(folder)
    assert [(clip.video, clip.prompt) for clip in clips] == ROWS
    assert [str(clip.origin) for clip in clips] == ["line 1", "line 3"]


def test_other_separators_do_not_end_a_line(folder):
    prompt = "one\u2028two\u0085three\x0bfour"
    write(folder, "metadata.jsonl", json.dumps({**A, "prompt": prompt}, ensure_ascii=False))
    assert read(folder) == [("a.mp4", prompt)]


BAD_OBJECTS = {
    "a list": ("[1]", r"\[1\] is no object; expected an object with the fields video and prompt"),
    "a text": ('"a.mp4"', r"'a.mp4' is no object"),
    "no video": ('{"prompt": "x"}', r"video is missing; expected it as a text"),
    "no prompt": ('{"video": "a.mp4"}', r"prompt is missing"),
    "null": ('{"video": "a.mp4", "prompt": null}', r"prompt=None: expected a text"),
    "a list of videos": ('{"video": ["a.mp4"], "prompt": "x"}', r"video=\['a.mp4'\]: expected a text"),
    "a number": ('{"video": "a.mp4", "prompt": 5}', r"prompt=5: expected a text"),
    "an object twice inside": (
        '{"video": {"a": 1, "a": 1}, "prompt": "x"}',
        r"video={'a': ..., 'a': ...}: expected a text",
    ),
    "a key twice": (
        '{"video": "a.mp4", "prompt": "x", "video": "a.mp4"}',
        r"key 'video' is given twice; expected an object",
    ),
    "too long a prompt": (json.dumps({**A, "prompt": "x" * 140_000}), r"prompt has 140,000 characters; .* 131,072"),
    "half a surrogate": (r'{"video": "a.mp4", "prompt": "\ud83d"}', r"prompt contains '\\ud83d', which is not Unicode"),
    "half in a name": (r'{"video": "\ud83d.mp4", "prompt": ""}', r"video contains '\\ud83d', which is not Unicode"),
    "NUL": (r'{"video": "a\u0000.mp4", "prompt": ""}', r"video='a\\x00.mp4': contains a NUL"),
    "parent": ('{"video": "../outside.mp4", "prompt": ""}', r"video='../outside.mp4': is outside the folder"),
    "absolute": ('{"video": "/etc/passwd", "prompt": ""}', r"is an absolute path; .*data.absolute_paths=true"),
    "URL": ('{"video": "http://a.org/a.mp4", "prompt": ""}', r"is a URL; .*download it first"),
    "the same twice": (json.dumps({**A, "video": "./a.mp4"}), r"repeats the video and prompt of (line 1|index 0)"),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_bad_objects(folder, name):
    """The other rows are read, and the message says which one is bad."""
    text, message = BAD_OBJECTS[name]
    write(folder, "metadata.jsonl", f"{lines(A)}{text}\n{lines(B)}")
    refused(folder, rf"metadata.jsonl:2: .*{message}")
    (folder / "metadata.jsonl").unlink()
    write(folder, "metadata.json", f"[{json.dumps(A)}, {text}, {json.dumps(B)}]")
    refused(folder, rf"metadata.json: index 1: .*{message}")


BAD_LINES = {
    "not JSON": (b"{video: 1}\n", r":1: not JSON \(Expecting property name .*, column 2\); expected JSON"),
    "cut off": (b'{"video": "a.mp4", "pro', r":1: not JSON"),
    "two on a line": (2 * lines(A)[:-1].encode(), r":1: not JSON \(Extra data"),
    "not UTF-8": (b'{"video": "a.mp4", "prompt": "caf\xe9"}\n', r":1: byte 33 is not UTF-8"),
    "UTF-16": (lines(A).encode("utf-16"), r"bad rows; line 1: byte 0 is not UTF-8"),
    "nested": (b"[" * 100_000 + b"\n", r":1: JSON nested too deeply"),
    "a long number": (
        b'{"video": "a.mp4", "prompt": "", "n": ' + b"9" * 5000 + b"}\n",
        r":1: JSON that cannot be read",
    ),
    "nothing": (b"", r"metadata.jsonl: is empty"),
    "blank lines": (b"\n \n\t\n", r"metadata.jsonl: no rows; expected a row for every clip"),
    "only a mark": (BOM.encode(), r"metadata.jsonl: no rows"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", r"is a git-lfs pointer"),
    "a page": (b"<!DOCTYPE html>", r"is an HTML page"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_jsonl(folder, name):
    content, message = BAD_LINES[name]
    write(folder, "metadata.jsonl", content)
    refused(folder, message)


def test_a_line_without_end(folder, monkeypatch):
    monkeypatch.setattr(metadata_formats, "LINE_LIMIT", 100)
    write(folder, "metadata.jsonl", lines(A) + json.dumps([A] * 10))
    refused(folder, r"metadata.jsonl:2: more than 100 bytes; expected one JSON object per line")


def test_jsonl_is_read_line_by_line(folder, monkeypatch):
    """The rows before a line that cannot be read have already been given."""
    monkeypatch.setattr(metadata_formats, "LINE_LIMIT", 200)
    rows = metadata_formats.read_jsonl(write(folder, "metadata.jsonl", lines(A, B) + " " * 300))
    assert [str(origin) for origin, _ in (next(rows), next(rows))] == ["line 1", "line 2"]
    with pytest.raises(InputError, match="jsonl:3"):
        next(rows)


BAD_FILES = {
    "an object": (json.dumps(A), r"is JSON, but no list; expected a list of objects"),
    "two lists": ("[][]", r"not JSON \(Extra data, column 3\)"),
    "lines": (lines(A, B), r"not JSON \(Extra data, line 2 column 1\)"),
    "cut off": (json.dumps([A, B])[:-9], r"not JSON"),
    "an empty list": ("[]", r"no rows; expected a row for every clip"),
    "nested": ("[" * 100_000, r"JSON nested too deeply"),
    "not UTF-8": (b'["\xff"]', r"byte 2 is not UTF-8"),
    "nothing": ("", r"is empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_json(folder, name):
    content, message = BAD_FILES[name]
    write(folder, "metadata.json", content)
    refused(folder, rf"metadata.json: {message}")


def test_a_json_file_that_is_too_large(folder, monkeypatch):
    monkeypatch.setattr(metadata_formats, "JSON_LIMIT", 20)
    write(folder, "metadata.json", json.dumps([A]))
    refused(folder, r"metadata.json: more than 20 bytes; expected a JSONL file, which is read line by line")


def test_all_bad_rows_are_reported_at_once(folder):
    write(folder, "metadata.jsonl", lines({"video": "a.mp4"}, A, [], A, "x"))
    assert refused(folder, "4 bad rows").endswith(
        "metadata.jsonl: 4 bad rows; line 1: prompt is missing; expected it as a text; line 3: [] is no object; "
        "expected an object with the fields video and prompt; "
        "line 4: repeats the video and prompt of line 2; expected each pair once; and 1 more"
    )


# --- ShareGPT4Video --------------------------------------------------------------------------------------------------


def annotation(video: str, *captions: str, summary: str = "-1") -> dict:
    parts = [{"idx": str(i), "content": text} for i, text in enumerate(captions)]
    parts[-1]["idx"] = summary
    return {
        "video_id": Path(video).stem, "video_path": video, "timestamp": ["00:00:00.000", "00:00:05.000"],
        "keyframe": [0, 60], "zip_folder": "panda_videos_1.zip", "captions": parts,
    }  # fmt: skip


@pytest.mark.parametrize("place", ["", "zip_folder/"])
def test_sharegpt4video(folder, place):
    (folder / place / "panda").mkdir(parents=True)
    (folder / place / "panda" / "x.mp4").touch()
    content = lines(annotation("panda/x.mp4", "a cat sits", "the cat jumps", "A cat sits, then jumps."))
    write(folder, "sharegpt4video_40k.jsonl", content)
    for source in (folder, folder / "sharegpt4video_40k.jsonl", write(folder, "some.jsonl", content)):
        assert find_metadata(source).format == "ShareGPT4Video"
        assert read(source) == [("panda/x.mp4", "A cat sits, then jumps.")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": []}, r"captions is \[\]; expected a list of objects"),
        ({"captions": "a cat"}, r"captions is 'a cat'; expected a list of objects"),
        ({"captions": ["a cat"]}, r"'a cat' is no object; expected .* idx and content"),
        ({"captions": [{"idx": "0", "content": "x"}]}, r"the last caption has idx '0'; expected -1, the summary"),
        ({"captions": [{"idx": "-1"}]}, r"content is missing"),
        ({"captions": [{"idx": "-1", "content": None}]}, r"content=None: expected a text"),
        ({"video_path": 5}, r"video_path=5: expected a text"),
        ({"video_path": "../outside.mp4"}, r"is outside the folder"),
    ],
)
def test_bad_annotations(folder, changes, message):
    good = annotation("a.mp4", "whole")
    write(folder, "sharegpt4video_40k.jsonl", lines(good, {**annotation("sub/b.webm", "whole"), **changes}))
    refused(folder, rf"sharegpt4video_40k.jsonl:2: .*{message}")


# --- Pairs of files --------------------------------------------------------------------------------------------------


def test_pairs(folder):
    for name in ("b.PNG", "c.d.avi", "notes.md", ".hidden.mp4"):
        (folder / name).touch()
    write(folder, "a.txt", f"{BOM}\n a cat \r\n")
    write(folder, "b.txt", "猫 🐈\nsits")
    write(folder, "c.d.txt", "")
    write(folder, "unused.txt", "no clip")
    clips = read_metadata(folder)
    assert [clip[1:] for clip in clips] == [
        ("a.mp4", "a cat", ("file", "a.txt")),
        ("b.PNG", "猫 🐈\nsits", ("file", "b.txt")),
        ("c.d.avi", "", ("file", "c.d.txt")),
    ]
    assert [clip.path for clip in clips] == [folder / clip.video for clip in clips]


def test_bad_pairs(folder):
    for name in ("b.mp4", "c.mp4", "d.mp4"):
        (folder / name).touch()
    write(folder, "a.txt", "a cat")
    write(folder, "b.txt", b"caf\xe9")
    write(folder.parent, "outside.txt", "secret")
    (folder / "c.txt").symlink_to(folder.parent / "outside.txt")
    message = refused(folder, r"clips: 3 bad rows; file b.txt: text file b.txt: byte 3 is not UTF-8")
    assert "file c.txt: text file c.txt: is outside the folder; expected a path relative to" in message
    assert "file d.mp4: text file d.txt: no such file; expected it in" in message


def test_a_long_text_file(folder):
    write(folder, "a.txt", "x" * 600_000)
    refused(folder, r"clips: file a.txt: prompt has 524,289 characters; expected at most 131,072")


def test_a_file_name_that_is_not_unicode(folder):
    try:
        (folder / os.fsdecode(b"caf\xe9.mp4")).touch()
    except OSError:
        pytest.skip("the file system has no such names")
    (folder / os.fsdecode(b"caf\xe9.txt")).touch()
    (folder / "a.txt").touch()
    refused(folder, r"video contains '\\udce9', which is not Unicode")


# --- The choice of the list ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("metadata.csv", "video,prompt\na.mp4,a cat\n", "CSV"),
        ("metadata.json", json.dumps([A]), "JSON"),
        ("metadata.jsonl", lines(A), "JSONL"),
        ("sharegpt4video_40k.jsonl", lines(annotation("a.mp4", "a cat")), "ShareGPT4Video"),
    ],
)
def test_a_folder_or_the_file_itself(folder, monkeypatch, name, content, kind):
    write(folder, "a.txt", "a file of metadata comes before pairs")
    monkeypatch.chdir(folder)
    other = Path(f"other{Path(name).suffix.upper()}")
    for source, file in ((folder, folder / name), (folder / name, folder / name), (other, other)):
        file.write_text(content)
        assert find_metadata(source)[:2] == (file, kind)
        assert read(source) == [("a.mp4", "a cat")]


def test_several_lists(folder):
    write(folder, "metadata.csv", "video,prompt\na.mp4,a cat\n")
    write(folder, "metadata.jsonl", lines(A, B))
    refused(folder, r"clips: contains metadata.csv and metadata.jsonl; expected one of them; .*/clips/metadata.csv")
    assert read(folder / "metadata.jsonl") == ROWS


def test_no_list(folder, tmp_path):
    refused(folder, r"clips: lists no clips; expected metadata.csv, metadata.json, .* or pairs of files such as a.mp4")
    refused(tmp_path / "none", r"none: no such file; expected a list of clips and their prompts, or the folder of one")
    refused(folder / "metadata.csv", r"metadata.csv: no such file")
    refused(write(folder, "list.yaml", ""), r"list.yaml: unknown file type; expected a folder or a file of type .csv")
    (folder / "metadata.json").mkdir()
    refused(folder, r"clips/metadata.json: no such file")
    (folder / "metadata.json").rmdir()
    (folder / "metadata.csv").symlink_to("nowhere")
    refused(folder, r"clips/metadata.csv: no such file")


# --- Absolute paths --------------------------------------------------------------------------------------------------


def test_absolute_paths(folder):
    outside = folder.parent / "outside.mp4"
    write(
        folder,
        "metadata.csv",
        f",Unnamed: 0,video,prompt\n0,0,{outside},far\n1,1,{folder}/../outside.mp4,way\n2,2,a.mp4,near\n",
    )
    refused(folder, rf"2 bad rows; line 2: video='{outside}': is an absolute path; .*\(tfm-prepare accepts it")
    assert read(folder, absolute_paths=True) == [
        (str(outside), "far"),
        (f"{folder}/../outside.mp4", "way"),
        ("a.mp4", "near"),
    ]
    assert read_metadata(folder, absolute_paths=True)[0].path == outside


def test_what_absolute_paths_do_not_allow(folder):
    (folder / "out.mp4").symlink_to(folder.parent / "outside.mp4")
    for name, message in {
        "file:///etc/passwd": "is a URL",
        "../outside.mp4": "is outside the folder",
        "out.mp4": "is outside the folder",
        "/etc/passwd\0.mp4": "contains a NUL",
    }.items():
        write(folder, "metadata.jsonl", lines({"video": name, "prompt": ""}))
        refused(folder, rf"metadata.jsonl:1: video=.*: {message}", absolute_paths=True)
    write(
        folder, "metadata.jsonl", lines({"video": f"{folder}/a.mp4", "prompt": "x"}, {"video": "a.mp4", "prompt": "x"})
    )
    refused(folder, r"jsonl:2: repeats the video and prompt of line 1", absolute_paths=True)
