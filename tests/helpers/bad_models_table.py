"""The table of bad input: model files in the Diffusers layout and PyTorch files."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from helpers.bad_input_table import Row, row
from helpers.breaking import (
    DEEP,
    GONE,
    HTML,
    LFS,
    REPEATED_KEY,
    Break,
    cut,
    deflated,
    edit_json,
    edit_tensors,
    evil,
    folder,
    overlapping,
    poison,
    pth,
    remove,
    safetensors,
    write,
)

# --- The model -------------------------------------------------------------------------------------------------------

MODEL = "--model.path=$tmp/model"
TENSORS = "diffusion_pytorch_model.safetensors"


def model(wrong: str, broken: Break, *words: str, programs: str = "train") -> list[Row]:
    return [row(program, wrong, MODEL, words=("$tmp/model", *words), broken=broken) for program in programs.split()]


def settings(network: str, program: str, *changes: tuple[str, object]) -> list[Row]:
    """Return rows with a config.json in which one key has another value, for each change."""
    rows = []
    for key, value in changes:
        text = "gone" if value is GONE else json.dumps(value)
        broken = edit_json(f"model/{network}/config.json", **{key: value})
        finite = not any(word in text for word in ("NaN", "Infinity"))  # JSON has neither
        words = ("config.json", text.strip("[").split(",")[0] if not finite else "class" if "class" in key else key)
        rows += model(f"{network} whose {key} is {text}", broken, network, *words, programs=program)
    return rows


def weights(wrong: str, broken: Break | Sequence[Break], *words: str) -> list[Row]:
    """Return rows with broken weights of a transformer, for training and for conversion."""
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
        words=("$world/clips", "contains no network of Wan2.1"),
    ),
    row(
        "train",
        "the settings of another model",
        "--model.dim=5120",
        "--model.heads=40",
        words=("transformer/config.json", "dim 96; expected 5120, the configured model.dim"),
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
        "a config.json that is not text",
        write("model/transformer/config.json", b"\xff\xfe{}"),
        "transformer/config.json",
    ),
    *weights("that are empty", write(FILE, "")),
    *weights("that are an HTML page", write(FILE, HTML), "HTML page"),
    *weights("that are a git-lfs pointer", write(FILE, LFS), "git-lfs pointer"),
    *weights("that are cut off", cut(FILE)),
    *weights("with a header of 2^62 bytes", write(FILE, (2**62).to_bytes(8, "little") + b"{}")),
    *weights("with a header that is not JSON", write(FILE, safetensors("{" * 100))),
    *weights("with a header nested 100,000 deep", write(FILE, safetensors(DEEP))),
    *weights("with a key twice", write(FILE, REPEATED_KEY)),
    *weights("with a NaN", edit_tensors(FILE, poison(BLOCK)), f"{BLOCK} has a NaN"),
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
    *weights(
        "whose index names a file of 300 letters", write(INDEX, json.dumps({"weight_map": {BLOCK: "x" * 300}})), "xxx"
    ),
    *weights("whose index has no weight map", write(INDEX, "{}"), "index.json", "weight_map"),
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

MODEL_FILES = [*MODELS, *PTH]
