"""The table of bad input: lists of clips, videos and images."""

from collections.abc import Sequence

from helpers.bad_input_table import Row, row
from helpers.breaking import (
    DEEP,
    HTML,
    PNG,
    Break,
    clip,
    cut,
    folder,
    link,
    matrix,
    metadata,
    png,
    remove,
    rename,
    sound_only,
    write,
)

# --- metadata.csv and clips ------------------------------------------------------------------------------------------


def table(wrong: str, content: str | bytes, *words: str) -> Row:
    source = "--data.source=$tmp/clips"
    return row(
        "prepare_data", f"metadata with {wrong}", source, words=("metadata.csv", *words), broken=metadata(content)
    )


def missing(wrong: str, name: str) -> Row:
    """Return a row in which the only video of the list does not exist."""
    words = ("data.max_rejected=0.05: 1 of the 1 videos cannot be used: 1 like", name, "no such file")
    broken = metadata(f"video,prompt\n{name},a\n")
    return row("prepare_data", f"metadata with {wrong}", "--data.source=$tmp/clips", words=words, broken=broken)


METADATA = [
    table("no rows", "video,prompt\n", "no rows"),
    table("no content", "", "no rows"),
    table("no column of prompts", "video,caption\n0000.mp4,a disc\n", ":1", "'prompt'", "expected one"),
    table("a repeated column", "video,prompt,video\n0000.mp4,a disc,0000.mp4\n", ":1", "2 columns 'video'"),
    table("bytes that are not UTF-8", b"video,prompt\n0000.mp4,\xff\xfe\n", "byte 22", "UTF-8"),
    table("a zero byte in a name", "video,prompt\n0000.mp4\0,a\n", ":2", "NUL"),
    table("an unclosed quote", 'video,prompt\n0000.mp4,"a disc\n', ":2"),
    table("a prompt of 200,000 letters", f"video,prompt\n0000.mp4,{'a' * 200_000}\n", ":2", "field larger"),
    table("one field too many", "video,prompt\n0000.mp4,a disc, red\n", ":2", "3 fields", "expected 2"),
    table("one field too few", "video,prompt\n0000.mp4\n", ":2", "1 field", "expected 2"),
    table("a repeated row", "video,prompt\n0000.mp4,a\n0000.mp4,a\n", ":3", "repeats the video and prompt of line 2"),
    table("an empty name", "video,prompt\n ,a\n", ":2", "empty"),
    table("a path outside the folder", "video,prompt\n../clips/0000.mp4,a\n", ":2", "is outside the folder"),
    table("an absolute path", "video,prompt\n/etc/passwd,a\n", ":2", "an absolute path"),
    table("an absolute Windows path", "video,prompt\nC:\\clip.mp4,a\n", ":2", "an absolute path"),
    table("a URL", "video,prompt\nhttps://example.org/a.mp4,a\n", ":2", "a URL"),
    missing("no such video", "0009.mp4"),
    missing("a folder instead of a video", "."),
    missing("a name of 5000 letters", "a" * 5000 + ".mp4"),
    row(
        "prepare_data",
        "no metadata",
        "--data.source=$tmp/clips",
        words=("$tmp/clips: lists no clips", "expected metadata.csv, metadata.json, ", "pairs of files"),
        broken=remove("clips/metadata.csv"),
    ),
    row("prepare_data", "no clips", "--data.source=$tmp/none", words=("$tmp/none", "no such"), broken=()),
    row(
        "prepare_data",
        "metadata that is a folder",
        "--data.source=$tmp/empty",
        words="metadata.csv",
        broken=folder("empty/metadata.csv"),
    ),
    row(
        "prepare_data",
        "metadata that links to itself",
        "--data.source=$tmp/clips",
        words="metadata.csv",
        broken=link("clips/metadata.csv", "metadata.csv"),
    ),
    row(
        "prepare_data",
        "a folder of clips that links to itself",
        "--data.source=$tmp/loop",
        words="$tmp/loop",
        broken=link("loop", "loop"),
    ),
    row(
        "prepare_data",
        "a clip that links to itself",
        "--data.source=$tmp/clips",
        words=("1 of the 4 videos cannot be used: 1 like 0000.mp4: no such file"),
        broken=link("clips/0000.mp4", "0000.mp4"),
    ),
    row(
        "prepare_data",
        "a clip that links to a file outside",
        "--data.source=$tmp/clips",
        words=("metadata.csv:2", "is outside"),
        broken=link("clips/0000.mp4", "$world/clips/0000.mp4"),
    ),
]


def listed(wrong: str, name: str, content: str | bytes, *words: str, options: Sequence[str] = ()) -> Row:
    """Return a row with a list of clips other than metadata.csv."""
    broken = [remove("clips/metadata.csv"), write(f"clips/{name}", content)]
    words = (f"clips/{name}", *words)
    return row("prepare_data", f"{name} {wrong}", "--data.source=$tmp/clips", *options, words=words, broken=broken)


GOOD = '{"video": "0000.mp4", "prompt": "a disc"}'
ABSOLUTE = ["--data.absolute_paths=true"]

LISTS = [
    listed("without content", "metadata.json", "", "is empty"),
    listed("that is an object", "metadata.json", GOOD, "expected a list of objects"),
    listed("that is nested", "metadata.json", DEEP, "nested too deeply"),
    listed("with a bad object", "metadata.json", f"[{GOOD}, 5]", "index 1", "expected an object"),
    listed("with a wrong type", "metadata.json", '[{"video": 5, "prompt": ""}]', "index 0", "video=5: expected a text"),
    listed("that is cut off", "metadata.jsonl", f"{GOOD}\n{GOOD[:20]}", ":2", "not JSON", "expected JSON"),
    listed(
        "with a repeated key", "metadata.jsonl", GOOD.replace("prompt", "video"), ":1", "key 'video' is given twice"
    ),
    listed("that is nested", "metadata.jsonl", DEEP, ":1", "nested too deeply"),
    listed("that is not UTF-8", "metadata.jsonl", b"\xff\n", ":1", "byte 0", "UTF-8"),
    listed("that repeats a row", "metadata.jsonl", f"{GOOD}\n{GOOD}", ":2", "of line 1"),
    listed("without a field", "metadata.jsonl", '{"video": "0000.mp4"}', ":1", "prompt is missing"),
    listed("with half a letter", "metadata.jsonl", GOOD.replace("disc", "\\ud800"), ":1", "not Unicode"),
    listed("with an absolute path", "metadata.jsonl", GOOD.replace("0000", "/0000"), ":1", "data.absolute_paths=true"),
    row(
        "prepare_data",
        "metadata.jsonl with an absolute path of nothing",
        "--data.source=$tmp/clips",
        *ABSOLUTE,
        words="1 of the 1 videos cannot be used: 1 like /0000.mp4: no such file",
        broken=[remove("clips/metadata.csv"), write("clips/metadata.jsonl", GOOD.replace("0000", "/0000"))],
    ),
    listed("with a URL", "metadata.jsonl", GOOD.replace("0000", "file:///0"), "is a URL", options=ABSOLUTE),
    listed("with a way out", "metadata.jsonl", GOOD.replace("0000", "../0"), "outside the folder", options=ABSOLUTE),
    listed(
        "without a summary",
        "sharegpt4video_40k.jsonl",
        '{"video_path": "0000.mp4", "captions": [{"idx": "0", "content": "a disc"}]}',
        ":1",
        "expected -1",
    ),
    row(
        "prepare_data",
        "two lists of clips",
        "--data.source=$tmp/clips",
        words=("$tmp/clips", "contains metadata.csv and metadata.jsonl", "expected one of them"),
        broken=write("clips/metadata.jsonl", GOOD),
    ),
    row(
        "prepare_data",
        "clips of which one has no text file",
        "--data.source=$tmp/clips",
        words=("$tmp/clips: 3 bad rows; file 0001.mp4: text file 0001.txt: no such file"),
        broken=[remove("clips/metadata.csv"), write("clips/0000.txt", "a disc")],
    ),
    row(
        "prepare_data",
        "a text file that is not UTF-8",
        "--data.source=$tmp/clips",
        words=("file 0000.txt: text file 0000.txt: byte 0 is not UTF-8"),
        broken=[remove("clips/metadata.csv"), write("clips/0000.txt", b"\xff")],
    ),
    row(
        "prepare_data",
        "a list of another type",
        "--data.source=$world/prompts.txt",
        words=("prompts.txt", "expected a folder or a file of type .csv, .json or .jsonl"),
    ),
    row("prepare_data", "a truth value", "--data.absolute_paths=2", words="expected true or false"),
]


def image(wrong: str, content: str | bytes | None, *words: str, options: Sequence[str] = ("--clip.frames=1",)) -> Row:
    """Return a row in which the only clip is an image; without content, it is a good one."""
    broken = [metadata("video,prompt\na.png,a disc\n"), write("clips/a.png", PNG if content is None else content)]
    source = "--data.source=$tmp/clips"
    return row("prepare_data", f"an image {wrong}", source, *options, words=("1 like a.png: ", *words), broken=broken)


IMAGES = [
    image("for a clip of several frames", None, "is an image, which has one frame; expected 5", options=()),
    image("that is cut off", PNG[:-30], "is damaged"),
    image("that is text", "text", "is not an image"),
    image("that is empty", "", "is not an image"),
    image("that is half transparent", png((255, 0, 0, 128)), "has transparent pixels"),
]


def video(wrong: str, broken: Break, *words: str) -> list[Row]:
    """Return rows with a bad clip. For `prepare_data`, which skips bad clips, it is the only one."""
    words = ("0002.mp4", *words)
    alone = metadata("video,prompt\n0002.mp4,a disc\n")
    return [
        row("evaluate", f"a clip {wrong}", "--reference=$tmp/clips", words=words, broken=broken),
        row("prepare_data", f"a clip {wrong}", "--data.source=$tmp/clips", words=words, broken=[broken, alone]),
    ]


MP4 = "clips/0002.mp4"

CLIPS = [
    *video("that is text", write(MP4, "not a video"), "damaged or not a video"),
    *video("that is empty", write(MP4, "")),
    *video("that is an HTML page", write(MP4, HTML)),
    *video("that is a playlist", write(MP4, "#EXTM3U\n/etc/passwd\n")),
    *video("that is cut off", cut(MP4)),
    *video("without its end", cut(MP4, 0.98)),
    *video("of one frame", clip(MP4, frames=1), "1 frame"),
    *video("of four frames", clip(MP4, frames=4), "4 frames"),
    *video("with sound only", sound_only(MP4), "no video stream"),
    *video("turned by an odd angle", matrix(MP4, 2, 1, -1, 2), "turns by multiples of 90 degrees"),
    *video("with a zero display matrix", matrix(MP4, 0, 0, 0, 0)),
    row("prepare_data", "clips too short", "--clip.frames=9", words=("0000.mp4: has 5 frames", "9 frames")),
    row(
        "prepare_data",
        "clips too short, to be refused",
        "--clip.frames=9",
        "--clip.short=refuse",
        words=("clip.short=refuse: 4 of 4 clips are too short", "0000.mp4: has 5 frames", "9 frames"),
    ),
    row("prepare_data", "a dry run with no source", "--dry-run", "--data.source=null", words="data.source"),
    row("prepare_data", "a dry run into a file", "--dry-run", "--data.path=$world/config.yaml", words="is a file"),
    row("evaluate", "clips too short", "--frames=9", words=("0000.mp4: has 5 frames", "9 frames")),
    row("evaluate", "no such folder", "$tmp/none", words=("$tmp/none", "no such folder")),
    row("evaluate", "an empty folder name", "", words="expected"),
    row(
        "evaluate",
        "a folder without clips",
        "$world/model",
        words=("$world/model", "0 mp4 files", "expected at least 2"),
    ),
    row("evaluate", "no such reference", "--reference=$tmp/none", words=("$tmp/none", "no such folder")),
    row(
        "evaluate",
        "a reference with too few clips",
        "--reference=$tmp/clips",
        words=("$tmp/clips", "expected at least 4"),
        broken=[remove("clips/metadata.csv"), remove("clips/0003.mp4")],
    ),
    row("evaluate", "a repeated folder", "$world/clips", "$world/clips", words=("clips", "2 folders")),
    row(
        "evaluate",
        "folders with different numbers of clips",
        "$world/clips",
        "$tmp/fewer",
        words=("clips has 4", "fewer has 3"),
        broken=[remove("clips/metadata.csv"), remove("clips/0003.mp4"), rename("clips", "fewer")],
    ),
    row(
        "evaluate",
        "metadata with a path outside the folder",
        "$tmp/clips",
        words=("metadata.csv:2", "is outside"),
        broken=metadata("video,prompt\n../a.mp4,a\n"),
    ),
    row("evaluate", "no such captions", "--prompts=$tmp/none.txt", words="$tmp/none.txt"),
    row("evaluate", "a wrong number of captions", "--prompts=$world/prompts.txt", words=("prompts.txt", "expected 4")),
    row(
        "evaluate",
        "captions that are not UTF-8",
        "--prompts=$tmp/p.txt",
        words=("p.txt", "UTF-8"),
        broken=write("p.txt", b"\xff\xfe\n"),
    ),
]

CLIP_FILES = [*METADATA, *LISTS, *IMAGES, *CLIPS]
