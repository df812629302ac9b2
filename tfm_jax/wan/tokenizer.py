"""From prompts to token ids and text embeddings, step for step as diffusers' `WanPipeline` does it."""

import html
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import ftfy
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerFast

from tfm_jax.arrays import TEXT_LENGTH, Text
from tfm_jax.errors import InputError
from tfm_jax.inputs import MAX_JSON_BYTES, read_json, short_repr
from tfm_jax.wan.text_encoder import UMT5Encoder

PLACES = ("tokenizer", "google/umt5-xxl")
"""Where the tokenizer is in a model directory: the Diffusers layout and ours, the original layout."""

_FILES = {
    "tokenizer.json": 2**25,
    "tokenizer_config.json": MAX_JSON_BYTES,
    "special_tokens_map.json": MAX_JSON_BYTES,
    "added_tokens.json": MAX_JSON_BYTES,
}
"""What transformers reads, each with a limit of its size; umT5's vocabulary takes 17 MB."""


def clean_prompt(text: str) -> str:
    """Repaired encoding, HTML entities resolved twice, every run of white space one space (`prompt_clean`)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def find_tokenizer(model: str | Path) -> Path | None:
    """The folder of the tokenizer's files in `model`, a directory in any layout; None where there is no such folder."""
    places = (Path(model, place) for place in PLACES)
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)


def _read(folder: Path) -> PreTrainedTokenizerFast:
    for name, limit in _FILES.items():
        if (folder / name).exists():
            read_json(folder / name, limit)
    try:
        # Not AutoTokenizer: from version 5 on it rebuilds T5's rules around the vocabulary instead of reading the file,
        # with <unk> fixed at id 2. In the files of umT5, id 2 is <s> and <unk> is 3.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        unnamed = [token for token in ("pad_token", "eos_token") if getattr(tokenizer, token) is None]
        empty = tokenizer("").input_ids
        if not unnamed:
            empty = tokenizer("", padding="max_length", max_length=3).input_ids
    except Exception as error:  # of any type, from two libraries
        raise InputError(
            f"{folder}: not the files of a tokenizer ({short_repr(str(error))}); download them again"
        ) from None
    if unnamed:
        raise InputError(f"{folder / 'tokenizer_config.json'}: {unnamed[0]} is missing; expected <pad> and </s> in it")
    if empty != [1, 0, 0]:
        raise InputError(
            f"{folder}: an empty prompt, padded to three tokens, becomes {short_repr(empty)}; expected </s> = 1 and "
            "<pad> = 0 behind it, as in umT5 (see tokenizer.json and tokenizer_config.json)"
        )
    return tokenizer


class Tokenizer:
    """The umT5 tokenizer beside the weights in `model`, a directory in any layout. Never downloads.

    Raises InputError where no place holds a `tokenizer.json`, or the files are not those of umT5's tokenizer.
    """

    def __init__(self, model: str | Path):
        if not Path(model).is_dir():
            raise InputError(f"{model}: no such directory; expected Wan2.1 weights")
        found = find_tokenizer(model)
        if not found:
            expected = " or ".join(str(Path(model, place, "tokenizer.json")) for place in PLACES)
            raise InputError(f"tokenizer: none in {model}; expected {expected}")
        self._tokenizer = _read(found)

    def __call__(
        self, prompts: Sequence[str], length: int = TEXT_LENGTH
    ) -> tuple[Int32[np.ndarray, "b l"], Int32[np.ndarray, "b l"]]:
        """Token ids and mask `[b, length]` of the cleaned prompts: ended by `</s>`, then padded with zeros.

        A longer prompt is cut, and a warning says by how much.
        """
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        for prompt, tokens in zip(cleaned, self._tokenizer(cleaned, verbose=False).input_ids, strict=True):
            if len(tokens) > length:
                dropped = f"{len(tokens)} tokens cut to {length}, {len(tokens) - length} dropped"
                warnings.warn(f"prompt too long: {dropped}: {prompt[:60]}...", stacklevel=2)
        tokens = self._tokenizer(cleaned, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return tokens.input_ids.astype(np.int32), tokens.attention_mask.astype(np.int32)


def encode_prompts(tokenizer: Tokenizer, encoder: UMT5Encoder, prompts: Sequence[str]) -> Text:
    """Text embeddings `[b, 512, d]` of the prompts as the video transformer expects them, padding set to zero.

    Raises InputError where the tokenizer gives ids that the encoder has no embedding for.
    """
    ids, mask = tokenizer(prompts)
    if ids.max() >= encoder.config.vocab_size:
        size = encoder.config.vocab_size
        raise InputError(f"tokenizer: gives token id {ids.max()}, but the text encoder has a vocabulary of {size}")
    embeddings = encoder(jnp.asarray(ids), jnp.asarray(mask))
    return embeddings * jnp.asarray(mask[..., None], embeddings.dtype)
