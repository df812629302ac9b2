"""The table of bad input: prepared data, prompts and LoRA files."""

from collections.abc import Callable, Sequence

import numpy as np
from helpers.bad_input_table import Row, row
from helpers.breaking import (
    DEEP,
    HTML,
    REPEATED_KEY,
    Break,
    cut,
    flip,
    lora,
    poison,
    remove,
    replace,
    write,
)

# --- Prepared data ---------------------------------------------------------------------------------------------------

DATA = "--data.path=$tmp/latents"
SHARD = "latents/tfm_clips-train.array_record-00000-of-00001"


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
    data(
        "of an earlier version", remove("latents/manifest.json"), "an earlier version wrote it; prepare the data again"
    ),
    data("whose manifest is cut off", cut("latents/manifest.json"), "manifest.json: cannot be used"),
    data("whose manifest is not JSON", write("latents/manifest.json", "what"), "manifest.json: cannot be used"),
    data("whose manifest is nested", write("latents/manifest.json", DEEP), "manifest.json: cannot be used"),
    data("that claims to have a hundred clips", replace("latents/manifest.json", '"records": 4', '"records": 100')),
    data("without its index", remove("latents/index.jsonl"), "index.jsonl: no such file"),
    data("whose index is cut off", cut("latents/index.jsonl"), "index.jsonl", "prepare the data again"),
    data(
        "that claims another shape of the latents", replace("latents/index.jsonl", "4, 6, 16]", "4, 8, 16]"), "differs"
    ),
    data("that claims another rank of the latents", replace("latents/index.jsonl", "4, 6, 16]", "4, 16]"), ":1"),
    data(
        "without its empty prompt", remove("latents/empty_prompt.safetensors"), "empty_prompt.safetensors: is missing"
    ),
    data("whose empty prompt is cut off", cut("latents/empty_prompt.safetensors"), "missing or damaged"),
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

DATA_FILES = [*PREPARED, *LORAS, *PROMPTS]
