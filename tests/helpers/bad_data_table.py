"""The table of bad input: metadata, clips, prepared data, prompts and LoRA files."""

from collections.abc import Callable, Sequence

import numpy as np
from helpers.bad_input_table import Row, row
from helpers.breaking import (
    DEEP,
    HTML,
    REPEATED_KEY,
    Break,
    clip,
    cut,
    flip,
    folder,
    link,
    lora,
    matrix,
    metadata,
    poison,
    remove,
    rename,
    replace,
    sound_only,
    write,
)

# --- metadata.csv and clips ------------------------------------------------------------------------------------------


def table(wrong: str, content: str | bytes, *words: str) -> Row:
    source = "--data.source=$tmp/clips"
    return row(
        "prepare_data", f"metadata with {wrong}", source, words=("metadata.csv", *words), broken=metadata(content)
    )


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
    table("no such video", "video,prompt\n0009.mp4,a\n", ":2", "video='0009.mp4'", "no such file"),
    table("an empty name", "video,prompt\n ,a\n", ":2", "empty"),
    table("a path outside the folder", "video,prompt\n../clips/0000.mp4,a\n", ":2", "is outside the folder"),
    table("an absolute path", "video,prompt\n/etc/passwd,a\n", ":2", "an absolute path"),
    table("an absolute Windows path", "video,prompt\nC:\\clip.mp4,a\n", ":2", "an absolute path"),
    table("a URL", "video,prompt\nhttps://example.org/a.mp4,a\n", ":2", "a URL"),
    table("a folder instead of a video", "video,prompt\n.,a\n", ":2", "no such file"),
    table("a name of 5000 letters", f"video,prompt\n{'a' * 5000}.mp4,a\n", ":2"),
    row(
        "prepare_data",
        "no metadata",
        "--data.source=$tmp/clips",
        words=("metadata.csv", "no such file"),
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
        words=("metadata.csv:2", "0000.mp4"),
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

# --- Prepared data ---------------------------------------------------------------------------------------------------

DATA = "--data.path=$tmp/latents"
SHARD = "latents/tfm_clips-train.array_record-00000"


def data(wrong: str, broken: Break, *words: str) -> Row:
    return row("train", f"data {wrong}", DATA, words=("$tmp/latents", *words), broken=broken)


PREPARED = [
    row("train", "no such data", "--data.path=$tmp/none", words=("$tmp/none", "tfm-prepare")),
    row("train", "clips instead of data", "--data.path=$world/clips", words=("$world/clips", "tfm-prepare")),
    row("train", "a file instead of data", "--data.path=$world/config.yaml", words=("config.yaml", "tfm-prepare")),
    row(
        "train",
        "a batch larger than the dataset",
        "--train.batch_size=5",
        words=("train.batch_size=5", "only 4 clips"),
    ),
    row("train", "a mesh with more devices than available", "--mesh.fsdp=2", words=("mesh.fsdp=2", "1 devices")),
    data("without its information", remove("latents/dataset_info.json"), "tfm-prepare"),
    data("whose information is cut off", cut("latents/dataset_info.json"), "tfm-prepare"),
    data("whose information is not JSON", write("latents/dataset_info.json", "what"), "tfm-prepare"),
    data("whose information is nested", write("latents/dataset_info.json", DEEP), "tfm-prepare"),
    data("that claims to have a hundred clips", replace("latents/dataset_info.json", '"4"', '"100"')),
    data("whose features are cut off", cut("latents/features.json"), "tfm-prepare"),
    data("without its features", remove("latents/features.json"), "tfm-prepare"),
    data("that claims another shape of the latents", replace("latents/features.json", '"6"', '"12"')),
    data("that claims another rank of the latents", replace("latents/features.json", '"6",', "")),
    data("that claims another width of the text", replace("latents/features.json", '"64"', '"32"')),
    data("without its shard", remove(SHARD), "missing"),
    data("with a shard cut off", cut(SHARD), "prepare the data again"),
    data("with an empty shard", write(SHARD, ""), "prepare the data again"),
    data("with a flipped bit in the first clip", flip(SHARD, 0.005)),
    data("with a flipped bit in its table of clips", flip(SHARD, 0.5)),
]

# --- LoRA files and prompts ------------------------------------------------------------------------------------------

Q = "diffusion_model.blocks.0.self_attn.q.lora_"


def adapters(wrong: str, broken: Break | Sequence[Break], *words: str) -> Row:
    return row("sample", f"a LoRA {wrong}", "--sampling.lora=$tmp/lora", words=("$tmp/lora", *words), broken=broken)


def both(number: int) -> Callable:
    """Return a change for `lora` that gives the factors of the first layer the width `number`."""
    return lambda t: t.update(
        {f"{Q}A.weight": np.ones((2, number), np.float32), f"{Q}B.weight": np.ones((number, 2), np.float32)}
    )


def widen(tensors: dict[str, np.ndarray]) -> None:
    """Change the factors in `lora` to the shapes of a model that is twice as wide."""
    for key, value in tensors.items():
        tensors[key] = np.tile(value, (1, 2) if "lora_A" in key else (2, 1))


def alpha(value: str) -> Break:
    rank = '"transformer.r": 2'
    return lora("lora", lora_adapter_metadata=f'{{{rank}, "transformer.lora_alpha": {value}}}')


LORAS = [
    row("sample", "no such LoRA", "--sampling.lora=$tmp/none", words=("$tmp/none", "no such file")),
    row("sample", "a folder instead of a LoRA", "--sampling.lora=$world", words="$world"),
    adapters("that is empty", write("lora", "")),
    adapters("that is an HTML page", write("lora", HTML), "HTML page"),
    adapters("that is text", write("lora", "not a LoRA")),
    adapters("that is cut off", [lora("lora"), cut("lora")]),
    adapters("with a repeated key", write("lora", REPEATED_KEY)),
    adapters("with unknown tensors", lora("lora", lambda t: t.update(more=np.ones(2, np.float32))), "more"),
    adapters(
        "for image to video",
        lora(
            "lora",
            lambda t: t.update(
                {f"{Q}A.weight".replace("self_attn.q", "cross_attn.k_img"): np.ones((2, 96), np.float32)}
            ),
        ),
        "k_img",
    ),
    adapters(
        "with one factor missing", lora("lora", lambda t: t.pop(f"{Q}B.weight")), "blocks.0.self_attn.q", "no B factor"
    ),
    adapters(
        "with two ranks",
        lora(
            "lora",
            lambda t: t.update(
                {f"{Q}A.weight": np.ones((3, 96), np.float32), f"{Q}B.weight": np.ones((96, 3), np.float32)}
            ),
        ),
        "rank",
    ),
    adapters(
        "whose factors do not match",
        lora("lora", lambda t: t.update({f"{Q}A.weight": np.ones((3, 96), np.float32)})),
        "blocks.0.self_attn.q",
    ),
    adapters("with a NaN", lora("lora", poison(f"{Q}A.weight")), "blocks.0.self_attn.q", "finite"),
    adapters("with one layer of another width", lora("lora", both(95)), "self_attn.q"),
    adapters("for a wider model", lora("lora", widen), "self_attn.q is [2, 192]", "expected [2, 96]"),
    adapters(
        "with one layer too many",
        lora(
            "lora", lambda t: t.update({k.replace("blocks.0", "blocks.4"): v for k, v in t.items() if "blocks.0" in k})
        ),
        "blocks.4",
    ),
    adapters(
        "with one layer too few", lora("lora", lambda t: [t.pop(k) for k in list(t) if "blocks.3" in k]), "blocks.3"
    ),
    adapters(
        "with scalars",
        lora("lora", lambda t: t.update({f"{Q}A.weight": np.ones((), np.float32)})),
        "blocks.0.self_attn.q",
    ),
    adapters("with integers", lora("lora", lambda t: t.update({f"{Q}A.weight": np.ones((2, 96), np.int32)})), "I32"),
    adapters("whose alpha is 10^400", alpha("1" + "0" * 400), "alpha"),
    adapters("whose alpha is NaN", alpha("NaN"), "NaN"),
    adapters("whose alpha is 0", alpha("0"), "alpha"),
    adapters("whose alpha is text", alpha('"2"'), "alpha"),
    adapters("whose metadata is nested", lora("lora", lora_adapter_metadata=DEEP), "metadata"),
    adapters("whose metadata is a list", lora("lora", lora_adapter_metadata="[]"), "metadata"),
]


def prompts(wrong: str, content: str | bytes, *words: str) -> Row:
    return row(
        "sample",
        f"prompts {wrong}",
        "--sampling.prompts=$tmp/p.txt",
        words=("p.txt", *words),
        broken=write("p.txt", content),
    )


PROMPTS = [
    row("sample", "no such prompts", "--sampling.prompts=$tmp/none.txt", words=("$tmp/none.txt", "expected")),
    row("sample", "a folder instead of prompts", "--sampling.prompts=$world", words=("$world", "expected")),
    prompts("without content", "", "no prompt"),
    prompts("of blank lines", "\n \n\t\n", "no prompt"),
    prompts("that are not UTF-8", b"a disc\n\xff\xfe\n", "UTF-8"),
]

DATA_FILES = [*METADATA, *CLIPS, *PREPARED, *LORAS, *PROMPTS]
