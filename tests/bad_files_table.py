"""The table of bad input, second part: files that other people made, and files that were damaged."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
from bad_input_table import Row, row
from breaking import (
    DEEP,
    GONE,
    HTML,
    LFS,
    REPEATED_KEY,
    Break,
    clip,
    cut,
    deflated,
    each,
    edit_json,
    edit_tensors,
    evil,
    flip,
    folder,
    link,
    lora,
    matrix,
    metadata,
    overlapping,
    poison,
    pth,
    remove,
    rename,
    replace,
    safetensors,
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
    table("nothing in it", "", "no rows"),
    table("no column of prompts", "video,caption\n0000.mp4,a disc\n", ":1", "'prompt'", "expected one"),
    table("a column twice", "video,prompt,video\n0000.mp4,a disc,0000.mp4\n", ":1", "2 columns 'video'"),
    table("bytes that are no text", b"video,prompt\n0000.mp4,\xff\xfe\n", "byte 22", "UTF-8"),
    table("a zero byte in a name", "video,prompt\n0000.mp4\0,a\n", ":2", "NUL"),
    table("a quote that stays open", 'video,prompt\n0000.mp4,"a disc\n', ":2"),
    table("a prompt of 200,000 letters", f"video,prompt\n0000.mp4,{'a' * 200_000}\n", ":2", "field larger"),
    table("a field too many", "video,prompt\n0000.mp4,a disc, red\n", ":2", "3 fields", "expected 2"),
    table("a field too few", "video,prompt\n0000.mp4\n", ":2", "1 field", "expected 2"),
    table("the same row twice", "video,prompt\n0000.mp4,a\n0000.mp4,a\n", ":3", "same video and prompt as line 2"),
    table("no such video", "video,prompt\n0009.mp4,a\n", ":2", "video='0009.mp4'", "no such file"),
    table("an empty name", "video,prompt\n ,a\n", ":2", "empty"),
    table("a path that leads out", "video,prompt\n../clips/0000.mp4,a\n", ":2", "leads out of the folder"),
    table("an absolute path", "video,prompt\n/etc/passwd,a\n", ":2", "an absolute path"),
    table("an absolute path of Windows", "video,prompt\nC:\\clip.mp4,a\n", ":2", "an absolute path"),
    table("a URL", "video,prompt\nhttps://example.org/a.mp4,a\n", ":2", "a URL"),
    table("a folder for a video", "video,prompt\n.,a\n", ":2", "no such file"),
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
        "a clip that links out",
        "--data.source=$tmp/clips",
        words=("metadata.csv:2", "leads out"),
        broken=link("clips/0000.mp4", "$world/clips/0000.mp4"),
    ),
]


def video(wrong: str, broken: Break, *words: str) -> list[Row]:
    """A clip that is no good: one of many, and the only one, for the program that passes over such clips."""
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
    *video("of sound alone", sound_only(MP4), "no video stream"),
    *video("turned by an odd angle", matrix(MP4, 2, 1, -1, 2), "turns by multiples of 90 degrees"),
    *video("of no angle at all", matrix(MP4, 0, 0, 0, 0)),
    row("prepare_data", "clips too short", "--clip.frames=9", words=("0000.mp4: 5 frames", "9 frames")),
    row("evaluate", "clips too short", "--frames=9", words=("0000.mp4: 5 frames", "9 frames")),
    row("evaluate", "no such folder", "$tmp/none", words=("$tmp/none", "no such folder")),
    row("evaluate", "an empty text for a folder", "", words="expected"),
    row(
        "evaluate",
        "a folder without clips",
        "$world/model",
        words=("$world/model", "0 mp4 files", "expected at least 2"),
    ),
    row("evaluate", "no such reference", "--reference=$tmp/none", words=("$tmp/none", "no such folder")),
    row(
        "evaluate",
        "a reference of few clips",
        "--reference=$tmp/clips",
        words=("$tmp/clips", "expected at least 4"),
        broken=[remove("clips/metadata.csv"), remove("clips/0003.mp4")],
    ),
    row("evaluate", "a folder twice", "$world/clips", "$world/clips", words=("clips", "2 folders")),
    row(
        "evaluate",
        "folders of different size",
        "$world/clips",
        "$tmp/fewer",
        words=("clips has 4", "fewer has 3"),
        broken=[remove("clips/metadata.csv"), remove("clips/0003.mp4"), rename("clips", "fewer")],
    ),
    row(
        "evaluate",
        "metadata with a path that leads out",
        "$tmp/clips",
        words=("metadata.csv:2", "leads out"),
        broken=metadata("video,prompt\n../a.mp4,a\n"),
    ),
    row("evaluate", "no such captions", "--prompts=$tmp/none.txt", words="$tmp/none.txt"),
    row("evaluate", "captions of another number", "--prompts=$world/prompts.txt", words=("prompts.txt", "expected 4")),
    row(
        "evaluate",
        "captions that are no text",
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
    row("train", "no such data", "--data.path=$tmp/none", words=("$tmp/none", "prepare_data.py")),
    row("train", "clips for data", "--data.path=$world/clips", words=("$world/clips", "prepare_data.py")),
    row("train", "a file for data", "--data.path=$world/config.yaml", words=("config.yaml", "prepare_data.py")),
    row(
        "train",
        "a batch of more clips than there are",
        "--train.batch_size=5",
        words=("train.batch_size=5", "only 4 clips"),
    ),
    row("train", "a mesh of more devices than there are", "--mesh.fsdp=2", words=("mesh.fsdp=2", "1 devices")),
    data("without its information", remove("latents/dataset_info.json"), "prepare_data.py"),
    data("whose information is cut off", cut("latents/dataset_info.json"), "prepare_data.py"),
    data("whose information is no JSON", write("latents/dataset_info.json", "what"), "prepare_data.py"),
    data("whose information is nested", write("latents/dataset_info.json", DEEP), "prepare_data.py"),
    data("of a hundred clips, it says", replace("latents/dataset_info.json", '"4"', '"100"')),
    data("whose features are cut off", cut("latents/features.json"), "prepare_data.py"),
    data("without its features", remove("latents/features.json"), "prepare_data.py"),
    data("with latents of another shape, it says", replace("latents/features.json", '"6"', '"12"')),
    data("with latents of another rank, it says", replace("latents/features.json", '"6",', "")),
    data("with texts of another width, it says", replace("latents/features.json", '"64"', '"32"')),
    data("without its shard", remove(SHARD), "missing"),
    data("with a shard cut off", cut(SHARD), "prepare the data again"),
    data("with an empty shard", write(SHARD, ""), "prepare the data again"),
    data("with a flipped bit in the first clip", flip(SHARD, 0.005)),
    data("with a flipped bit in its table of clips", flip(SHARD, 0.5)),
]

# --- The model -------------------------------------------------------------------------------------------------------

MODEL = "--model.path=$tmp/model"
TENSORS = "diffusion_pytorch_model.safetensors"


def model(wrong: str, broken: Break, *words: str, programs: str = "train") -> list[Row]:
    return [row(program, wrong, MODEL, words=("$tmp/model", *words), broken=broken) for program in programs.split()]


def settings(network: str, program: str, *changes: tuple[str, object]) -> list[Row]:
    """config.json of a network with another value for a key."""
    rows = []
    for key, value in changes:
        told = "gone" if value is GONE else json.dumps(value)
        broken = edit_json(f"model/{network}/config.json", **{key: value})
        finite = not any(word in told for word in ("NaN", "Infinity"))  # these are no JSON
        words = ("config.json", told.strip("[").split(",")[0] if not finite else "class" if "class" in key else key)
        rows += model(f"{network} whose {key} is {told}", broken, network, *words, programs=program)
    return rows


def weights(wrong: str, broken: Break | Sequence[Break], *words: str) -> list[Row]:
    """A transformer, for training and for conversion."""
    return [
        row("train", f"weights {wrong}", MODEL, words=("$tmp/model/transformer", *words), broken=broken),
        row(
            "convert_weights",
            f"weights {wrong}",
            "$tmp/model",
            "$tmp/new",
            words=("$tmp/model/transformer", *words),
            broken=broken,
        ),
    ]


BLOCK = "blocks.1.attn1.to_q.weight"
FILE = f"model/transformer/{TENSORS}"
INDEX = "model/transformer/diffusion_pytorch_model.safetensors.index.json"

MODELS = [
    *(
        row(p, "no such model", "--model.path=$tmp/none", words=("$tmp/none", "expected"))
        for p in ("train", "sample", "prepare_data")
    ),
    *(
        row(p, "clips for a model", "--model.path=$world/clips", words=("$world/clips", "expected"))
        for p in ("train", "sample", "prepare_data")
    ),
    row("convert_weights", "no such source", "$tmp/none", "$tmp/new", words=("$tmp/none", "no such directory")),
    row(
        "convert_weights",
        "clips for a source",
        "$world/clips",
        "$tmp/new",
        words=("$world/clips", "no network of Wan2.1 found"),
    ),
    row(
        "train",
        "the settings of another model",
        "--model.dim=5120",
        "--model.heads=40",
        words=("transformer/config.json", "dim 96", "model.dim=5120"),
    ),
    *settings(
        "transformer",
        "train",
        ("num_layers", 8.0),
        ("num_layers", "8"),
        ("num_layers", None),
        ("num_layers", True),
        ("num_layers", -1),
        ("num_layers", 10**30),
        ("num_layers", GONE),
        ("eps", None),
        ("eps", float("nan")),
        ("eps", -1e-6),
        ("eps", 1e400),
        ("freq_dim", -4),
        ("freq_dim", "256"),
        ("freq_dim", 255),
        ("num_attention_heads", 0),
        ("attention_head_dim", "7"),
        ("in_channels", []),
        ("patch_size", [1, 4, 4]),
        ("qk_norm", None),
        ("ffn_dim", {}),
        ("_class_name", {}),
        ("_class_name", ["WanModel"]),
        ("_class_name", "WanVACETransformer3DModel"),
        ("_class_name", GONE),
    ),
    *settings(
        "vae",
        "sample",
        ("latents_std", "1"),
        ("latents_std", [1.0]),
        ("latents_std", [0.0] * 16),
        ("latents_std", None),
        ("latents_mean", ["a"] * 16),
        ("latents_mean", [float("inf")] * 16),
        ("dim_mult", 4),
        ("dim_mult", []),
        ("z_dim", 16.5),
        ("base_dim", 0),
        ("temperal_downsample", [0, 1, 2]),
        ("_class_name", "AutoencoderKL"),
    ),
    *settings(
        "text_encoder",
        "sample",
        ("vocab_size", "256"),
        ("d_kv", 0),
        ("num_layers", 2.5),
        ("layer_norm_epsilon", None),
        ("relative_attention_num_buckets", -32),
        ("feed_forward_proj", "relu"),
        ("architectures", "UMT5EncoderModel"),
        ("architectures", []),
    ),
    *model(
        "a model for image to video", edit_json("model/transformer/config.json", in_channels=36), "config.json", "36"
    ),
    *model("a config.json that is cut off", cut("model/transformer/config.json"), "transformer/config.json"),
    *model("a config.json that is empty", write("model/transformer/config.json", ""), "transformer/config.json"),
    *model(
        "a config.json that is an HTML page", write("model/transformer/config.json", HTML), "transformer/config.json"
    ),
    *model(
        "a config.json nested 100,000 deep", write("model/transformer/config.json", DEEP), "transformer/config.json"
    ),
    *model("a config.json that is a list", write("model/transformer/config.json", "[]"), "transformer/config.json"),
    *model(
        "a config.json that is no text",
        write("model/transformer/config.json", b"\xff\xfe{}"),
        "transformer/config.json",
    ),
    *weights("that are empty", write(FILE, "")),
    *weights("that are an HTML page", write(FILE, HTML), "HTML page"),
    *weights("that are a git-lfs pointer", write(FILE, LFS), "git-lfs pointer"),
    *weights("that are cut off", cut(FILE)),
    *weights("with a header of 2^62 bytes", write(FILE, (2**62).to_bytes(8, "little") + b"{}")),
    *weights("with a header that is no JSON", write(FILE, safetensors("{" * 100))),
    *weights("with a header nested 100,000 deep", write(FILE, safetensors(DEEP))),
    *weights("with a key twice", write(FILE, REPEATED_KEY)),
    *weights("with a NaN", edit_tensors(FILE, poison(BLOCK)), "NaN"),
    *weights("with an infinite number", edit_tensors(FILE, poison(BLOCK, np.inf)), "NaN or infinite"),
    *weights("without a tensor", edit_tensors(FILE, lambda tensors: tensors.pop(BLOCK)), "missing", BLOCK),
    *weights("with a tensor too many", edit_tensors(FILE, lambda t: t.update(more=t[BLOCK])), "more"),
    *weights(
        "with a tensor of another shape",
        edit_tensors(FILE, lambda t: t.update({BLOCK: t[BLOCK][:, :95]})),
        BLOCK,
        "[96, 95]",
    ),
    *weights(
        "of whole numbers", edit_tensors(FILE, lambda t: t.update({BLOCK: t[BLOCK].astype(np.int8)})), BLOCK, "I8"
    ),
    *weights("in no file", remove(FILE), "safetensors"),
    *weights("that are a folder", [remove(FILE), folder(FILE)]),
    *weights(
        "whose index names a file outside",
        write(INDEX, json.dumps({"weight_map": {BLOCK: "../../vae/x.safetensors"}})),
        "index.json",
        "same directory",
    ),
    *weights(
        "whose index names a missing file",
        write(INDEX, json.dumps({"weight_map": {BLOCK: "x.safetensors"}})),
        "x.safetensors",
        "missing",
    ),
    *weights("whose index has no map", write(INDEX, "{}"), "index.json", "weight_map"),
    *weights("whose index names no file", write(INDEX, '{"weight_map": {}}'), "index.json"),
    *weights("whose index has numbers for files", write(INDEX, '{"weight_map": {"a": 1, "b": "c"}}'), "index.json"),
    *weights("whose index is nested 100,000 deep", write(INDEX, DEEP), "index.json"),
    *model("no autoencoder", remove("model/vae"), "no vae found", programs="sample prepare_data"),
    *model(
        "an autoencoder with a NaN",
        edit_tensors(f"model/vae/{TENSORS}", poison("decoder.conv_in.weight")),
        "vae",
        "NaN",
        programs="sample prepare_data",
    ),
    *model(
        "an autoencoder without a tensor",
        edit_tensors(f"model/vae/{TENSORS}", lambda t: t.pop("decoder.conv_in.bias")),
        "vae",
        "decoder.conv_in.bias",
        programs="sample prepare_data",
    ),
    *model(
        "an autoencoder of another shape",
        edit_tensors(f"model/vae/{TENSORS}", lambda t: t.update({"decoder.conv_in.bias": np.zeros(5, np.float32)})),
        "vae",
        "decoder.conv_in.bias",
        programs="sample",
    ),
    *model("an autoencoder that is cut off", cut(f"model/vae/{TENSORS}"), "vae", programs="sample"),
    *model("no text encoder", remove("model/text_encoder"), "no text_encoder found", programs="sample prepare_data"),
    *model(
        "a text encoder with a NaN",
        edit_tensors("model/text_encoder/model.safetensors", poison("shared.weight")),
        "text_encoder",
        "NaN",
        programs="sample prepare_data",
    ),
    *model(
        "a text encoder that is cut off", cut("model/text_encoder/model.safetensors"), "text_encoder", programs="sample"
    ),
    *model("no tokenizer", remove("model/tokenizer"), "tokenizer", programs="sample prepare_data"),
    *model(
        "a tokenizer that is cut off",
        cut("model/tokenizer/tokenizer.json"),
        "tokenizer",
        programs="sample prepare_data",
    ),
    *model("a tokenizer that is empty", write("model/tokenizer/tokenizer.json", ""), "tokenizer", programs="sample"),
    *model(
        "a tokenizer that is a git-lfs pointer",
        write("model/tokenizer/tokenizer.json", LFS),
        "tokenizer",
        programs="sample",
    ),
    *model(
        "a tokenizer that is other JSON",
        write("model/tokenizer/tokenizer.json", '{"a": 1}'),
        "tokenizer",
        programs="sample",
    ),
    *model(
        "a tokenizer nested 100,000 deep", write("model/tokenizer/tokenizer.json", DEEP), "tokenizer", programs="sample"
    ),
    *model(
        "a tokenizer whose configuration is cut off",
        cut("model/tokenizer/tokenizer_config.json"),
        "tokenizer",
        programs="sample",
    ),
    *model(
        "a tokenizer whose configuration is a list",
        write("model/tokenizer/tokenizer_config.json", "[]"),
        "tokenizer",
        programs="sample",
    ),
    *model(
        "a tokenizer without a token to pad with",
        edit_json("model/tokenizer/tokenizer_config.json", pad_token=GONE),
        "tokenizer",
        programs="sample",
    ),
]

# --- PyTorch files ---------------------------------------------------------------------------------------------------

VAE_PTH = "original/Wan2.1_VAE.pth"


def checkpoint(wrong: str, broken: Break, *words: str) -> Row:
    return row(
        "convert_weights",
        f"a .pth {wrong}",
        "$tmp/original",
        "$tmp/new",
        words=("Wan2.1_VAE.pth", *words),
        broken=broken,
    )


PTH = [
    checkpoint("that is empty", write(VAE_PTH, "")),
    checkpoint("that is an HTML page", write(VAE_PTH, HTML), "HTML page"),
    checkpoint("that is a git-lfs pointer", write(VAE_PTH, LFS), "git-lfs pointer"),
    checkpoint("that is text", write(VAE_PTH, "not a checkpoint")),
    checkpoint("that runs code", evil(VAE_PTH)),
    checkpoint("with compressed entries", deflated(VAE_PTH)),
    *(
        checkpoint(wrong, pth(VAE_PTH, state))
        for wrong, state in (
            ("of nothing", dict),
            ("of a list", lambda: [torch.ones(2)]),
            ("of a number", lambda: {"a": 1.0}),
            ("of tensors below another name", lambda: {"state_dict": {"a": torch.ones(2)}}),
            ("with a number for a name", lambda: {1: torch.ones(2)}),
            ("of a tensor without data", lambda: {"a": torch.ones(2, device="meta")}),
            ("of a parameter", lambda: {"a": torch.nn.Parameter(torch.ones(2))}),
            ("of complex numbers", lambda: {"a": torch.ones(2, dtype=torch.complex64).conj()}),
            ("of whole numbers", lambda: {"a": torch.ones(2, dtype=torch.int64)}),
            ("of quantised numbers", lambda: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)}),
            ("of a sparse tensor", lambda: {"a": torch.eye(3).to_sparse()}),
            ("of an empty tensor", lambda: {"a": torch.ones(0)}),
            ("of 256 GiB in a few bytes", lambda: {"a": torch.ones(1).expand(2**36)}),
            ("of a transposed tensor", lambda: {"a": torch.ones(2, 3).T}),
            ("of tensors that overlap", overlapping),
        )
    ),
]

# --- LoRA files and prompts ------------------------------------------------------------------------------------------

Q = "diffusion_model.blocks.0.self_attn.q.lora_"


def adapters(wrong: str, broken: Break | Sequence[Break], *words: str) -> Row:
    return row("sample", f"a LoRA {wrong}", "--sampling.lora=$tmp/lora", words=("$tmp/lora", *words), broken=broken)


def both(number: int) -> Callable:
    """For `lora`: the first layer's factors are of another width."""
    return lambda t: t.update(
        {f"{Q}A.weight": np.ones((2, number), np.float32), f"{Q}B.weight": np.ones((number, 2), np.float32)}
    )


def alpha(value: str) -> Break:
    rank = '"transformer.r": 2'
    return lora("lora", lora_adapter_metadata=f'{{{rank}, "transformer.lora_alpha": {value}}}')


LORAS = [
    row("sample", "no such LoRA", "--sampling.lora=$tmp/none", words=("$tmp/none", "no such file")),
    row("sample", "a folder for a LoRA", "--sampling.lora=$world", words="$world"),
    adapters("that is empty", write("lora", "")),
    adapters("that is an HTML page", write("lora", HTML), "HTML page"),
    adapters("that is text", write("lora", "not a LoRA")),
    adapters("that is cut off", [lora("lora"), cut("lora")]),
    adapters("with a key twice", write("lora", REPEATED_KEY)),
    adapters("of other tensors", lora("lora", lambda t: t.update(more=np.ones(2, np.float32))), "more"),
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
        "of two ranks",
        lora(
            "lora",
            lambda t: t.update(
                {f"{Q}A.weight": np.ones((3, 96), np.float32), f"{Q}B.weight": np.ones((96, 3), np.float32)}
            ),
        ),
        "rank",
    ),
    adapters(
        "whose factors do not fit",
        lora("lora", lambda t: t.update({f"{Q}A.weight": np.ones((3, 96), np.float32)})),
        "blocks.0.self_attn.q",
    ),
    adapters("with a NaN", lora("lora", poison(f"{Q}A.weight")), "blocks.0.self_attn.q", "finite"),
    adapters("with one layer of another width", lora("lora", both(95)), "self_attn.q"),
    adapters(
        "with a layer too many",
        lora(
            "lora", lambda t: t.update({k.replace("blocks.0", "blocks.4"): v for k, v in t.items() if "blocks.0" in k})
        ),
        "blocks.4",
    ),
    adapters(
        "with a layer too few", lora("lora", lambda t: [t.pop(k) for k in list(t) if "blocks.3" in k]), "blocks.3"
    ),
    adapters(
        "of scalars",
        lora("lora", lambda t: t.update({f"{Q}A.weight": np.ones((), np.float32)})),
        "blocks.0.self_attn.q",
    ),
    adapters("of whole numbers", lora("lora", lambda t: t.update({f"{Q}A.weight": np.ones((2, 96), np.int32)})), "I32"),
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
    row("sample", "a folder for prompts", "--sampling.prompts=$world", words=("$world", "expected")),
    prompts("with nothing in them", "", "no prompt"),
    prompts("of blanks", "\n \n\t\n", "no prompt"),
    prompts("that are no text", b"a disc\n\xff\xfe\n", "UTF-8"),
]

# --- Checkpoints -----------------------------------------------------------------------------------------------------

STEPS = "run/checkpoints/[123]"
SUMMARY = f"{STEPS}/_CHECKPOINT_METADATA"


def saved(wrong: str, broken: Break, *words: str) -> list[Row]:
    """All checkpoints of a run are damaged, so that none is left to go on from."""
    resume = ("--train.output=$tmp/run", "--train.steps=5", "--resume")
    words = ("$tmp/run", *words)
    return [
        row("train", f"resumed from {wrong}", *resume, words=words, broken=broken)._replace(set_aside=True),
        row("export_lora", wrong, "$tmp/run", "$tmp/new", words=words, broken=broken),
    ]


CHECKPOINTS = [
    row("export_lora", "no such run", "$tmp/none", "$tmp/new", words=("$tmp/none", "expected")),
    row("export_lora", "clips for a run", "$world/clips", "$tmp/new", words=("$world/clips", "expected")),
    row("export_lora", "an empty text for a run", "", "$tmp/new", words="expected"),
    row("export_lora", "a file for a run", "$world/config.yaml", "$tmp/new", words=("config.yaml", "expected")),
    *saved("a run without checkpoints", each(STEPS, remove)),
    *saved("checkpoints without metadata", each(SUMMARY, remove)),
    *saved("checkpoints with metadata cut off", each(SUMMARY, cut)),
    *saved("checkpoints with empty metadata", each(SUMMARY, lambda name: write(name, ""))),
    *saved(
        "checkpoints with another alpha", each(SUMMARY, lambda name: replace(name, 'alpha\\": 32.0', 'alpha\\": 6.0'))
    ),
    *saved("checkpoints with metadata nested", each(SUMMARY, lambda name: write(name, DEEP))),
    *saved("checkpoints without a manifest", each(f"{STEPS}/state/manifest.ocdbt", remove)),
    *saved("checkpoints with a manifest cut off", each(f"{STEPS}/state/manifest.ocdbt", cut)),
    *saved("checkpoints with a flipped bit", each(f"{STEPS}/state/d/*", flip)),
    *saved("checkpoints with arrays cut off", each(f"{STEPS}/state/ocdbt.process_0/d/*", cut)),
    *saved(
        "checkpoints with a flipped bit in the arrays",
        each(f"{STEPS}/state/ocdbt.process_0/d/*", lambda name: flip(name, 0.5)),
    ),
    *saved("checkpoints without arrays", each(f"{STEPS}/state", remove)),
    row(
        "export_lora",
        "a checkpoint under another number",
        "$tmp/run",
        "$tmp/new",
        "--step=41",
        words=("$tmp/run", "41"),
        broken=rename("run/checkpoints/3", "run/checkpoints/41"),
    ),
    row(
        "export_lora",
        "an empty folder for a checkpoint",
        "$tmp/run",
        "$tmp/new",
        "--step=41",
        words=("$tmp/run", "41"),
        broken=folder("run/checkpoints/41"),
    ),
]

FILES = [*METADATA, *CLIPS, *PREPARED, *MODELS, *PTH, *LORAS, *PROMPTS, *CHECKPOINTS]
