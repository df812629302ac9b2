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

from tfm_jax.arrays import Text
from tfm_jax.errors import InputError
from tfm_jax.wan.text_encoder import UMT5Encoder
from tfm_jax.wan.transformer import TEXT_LENGTH

PLACES = ("tokenizer", "google/umt5-xxl")
"""Where the tokenizer lies in a model directory: the Diffusers layout, the original layout."""


def clean_prompt(text: str) -> str:
    """Repaired encoding, HTML entities resolved twice, every run of white space one space (`prompt_clean`)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def find_tokenizer(model: str | Path) -> Path | None:
    """The folder of the tokenizer's files in `model`, a directory in any layout; None where there is no such folder."""
    places = (Path(model, place) for place in PLACES)
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)


class Tokenizer:
    """The umT5 tokenizer that lies beside the weights in `model`, a directory in either layout. Never downloads.

    Raises InputError where neither place holds a `tokenizer.json`.
    """

    def __init__(self, model: str | Path):
        if not Path(model).is_dir():
            raise InputError(f"{model}: no such directory; expected Wan2.1 weights")
        found = find_tokenizer(model)
        if not found:
            expected = " or ".join(str(Path(model, place, "tokenizer.json")) for place in PLACES)
            raise InputError(f"tokenizer: none in {model}; expected {expected}")
        # Not AutoTokenizer: from version 5 on it rebuilds T5's rules around the vocabulary instead of reading the file,
        # with <unk> fixed at id 2. In the files of umT5, id 2 is <s> and <unk> is 3.
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(found, local_files_only=True)

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
