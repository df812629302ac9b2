"""Turn prompts into token ids and text embeddings, in the same steps as diffusers' `WanPipeline`."""

import html
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import ftfy
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int32
from transformers import PreTrainedTokenizerFast

from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.errors import InputError
from tfm_jax.inputs import MAX_JSON_BYTES, read_json, short_repr
from tfm_jax.sharding import fetch, one_device_mesh, split_batch
from tfm_jax.wan.text_encoder import UMT5Encoder

FOLDERS = ("tokenizer", "google/umt5-xxl")
"""Folder of the tokenizer in a model directory: the first in the Diffusers layout and ours, the second in Wan-AI's."""

_FILES = {
    "tokenizer.json": 2**25,
    "tokenizer_config.json": MAX_JSON_BYTES,
    "special_tokens_map.json": MAX_JSON_BYTES,
    "added_tokens.json": MAX_JSON_BYTES,
}
"""The files that transformers reads, and the maximum size of each in bytes. umT5's tokenizer.json takes 17 MB."""

_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>"}


def clean_prompt(text: str) -> str:
    """Repair the encoding, unescape HTML entities twice and collapse white space, as diffusers' `prompt_clean` does."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def find_tokenizer(model: str | Path) -> Path | None:
    """Return the folder of the tokenizer in a model directory of any layout, or None if there is none."""
    folders = (Path(model, name) for name in FOLDERS)
    return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)


def _read(folder: Path) -> PreTrainedTokenizerFast:
    for name, limit in _FILES.items():
        if (folder / name).exists():
            read_json(folder / name, limit)
    try:
        # From transformers 5 on, AutoTokenizer takes only the vocabulary from the file: it applies T5's own rules, with
        # <unk> at id 2. In the files of umT5, id 2 is <s>, and <unk> has id 3.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        unnamed = [token for token in _TOKENS if getattr(tokenizer, token) is None]
        empty = tokenizer("").input_ids
        if not unnamed:
            empty = tokenizer("", padding="max_length", max_length=3).input_ids
    except Exception as error:  # transformers and tokenizers may raise any exception
        raise InputError(f"{folder}: not a tokenizer ({short_repr(str(error))}); download it again") from None
    if unnamed:
        raise InputError(f"{folder / 'tokenizer_config.json'}: {unnamed[0]} is missing; expected {_TOKENS[unnamed[0]]}")
    if empty != [1, 0, 0]:
        raise InputError(
            f"{folder}: an empty prompt, padded to three tokens, becomes {short_repr(empty)}; expected [1, 0, 0], "
            "which is </s> <pad> <pad> in umT5 (see tokenizer.json and tokenizer_config.json)"
        )
    return tokenizer


class Tokenizer:
    """The umT5 tokenizer of a model directory in any layout. Nothing is ever downloaded.

    Raises:
        InputError: the directory has no tokenizer, or its tokenizer is damaged or not umT5's.
    """

    def __init__(self, model: str | Path):
        if not Path(model).exists():
            raise InputError(f"{model}: no such directory; expected Wan2.1 weights")
        if not Path(model).is_dir():
            raise InputError(f"{model}: is one file, without a tokenizer; expected the directory of a whole model")
        found = find_tokenizer(model)
        if not found:
            expected = " or ".join(str(Path(model, name, "tokenizer.json")) for name in FOLDERS)
            raise InputError(f"{model}: has no tokenizer; expected {expected}")
        self._tokenizer = _read(found)

    def __call__(
        self, prompts: Sequence[str], length: int = TEXT_LENGTH
    ) -> tuple[Int32[np.ndarray, "b l"], Int32[np.ndarray, "b l"]]:
        """Clean the prompts and return their token ids and mask, each `[b, length]`.

        The ids of every prompt end with `</s>` and are padded with zeros. A prompt that is too long is truncated, with
        a warning that gives the number of dropped tokens.
        """
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        for prompt, tokens in zip(cleaned, self._tokenizer(cleaned, verbose=False).input_ids, strict=True):
            if len(tokens) > length:
                dropped = f"{len(tokens)} tokens cut to {length}, {len(tokens) - length} dropped"
                warnings.warn(f"prompt too long: {dropped}: {prompt[:60]}...", stacklevel=2)
        tokens = self._tokenizer(cleaned, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return tokens.input_ids.astype(np.int32), tokens.attention_mask.astype(np.int32)


def encode_prompts(
    tokenizer: Tokenizer, encoder: UMT5Encoder, prompts: Sequence[str], mesh: Mesh | None = None,
    length: int = TEXT_LENGTH,
) -> list[Float[np.ndarray, "_ d"]]:  # fmt: skip
    """Return the text embedding of each prompt, one row per token, without padding (see `arrays.pad_text`).

    As in Wan, the encoder runs on ids that are padded to `length` tokens. A prompt that is too long is truncated,
    with a warning.

    Args:
        mesh: the devices of the encoder, which divide the prompts evenly; None means the first device alone. All
            processes of the mesh call this, and each gets all embeddings.

    Raises:
        InputError: a token id is outside the vocabulary of the encoder.
    """
    ids, mask = tokenizer(prompts, length)
    if ids.max() >= encoder.config.vocab_size:
        size = encoder.config.vocab_size
        raise InputError(
            f"tokenizer: token id {ids.max()} is not in the text encoder's vocabulary; expected less than {size}"
        )
    mesh = mesh or one_device_mesh()
    with jax.set_mesh(mesh):
        embeddings = fetch(encoder(split_batch(ids, mesh), split_batch(mask, mesh)))
    return [embedding[:length] for embedding, length in zip(embeddings, mask.sum(1), strict=True)]
