"""Builds a small T5 tokenizer from a corpus, for the embedded model and the tests."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import T5Tokenizer

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def write_tokenizer(directory: str | Path, corpus: Iterable[str], vocab_size: int) -> None:
    """Save a Unigram tokenizer of at most `vocab_size` pieces as the files of a `T5TokenizerFast`.

    Ids 0, 1 and 2 are `<pad>`, `</s>` and `<unk>`; words begin with T5's "▁". The other pieces are the characters of
    the corpus, then its words, both from the most frequent to the rarest, with the logarithm of their frequency as the
    score; anything else becomes `<unk>`. Nothing is random, so the same corpus always gives the same ids.
    """
    words = Counter(f"▁{word}" for text in corpus for word in text.split())
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    pieces = [(token, 0.0) for token in SPECIAL_TOKENS] + _by_frequency(characters)
    pieces += [(word, score) for word, score in _by_frequency(words) if len(word) > 1]
    T5Tokenizer(vocab=pieces[:vocab_size], extra_ids=0).save_pretrained(directory)


def _by_frequency(counts: Counter[str]) -> list[tuple[str, float]]:
    """Return pieces with the logarithm of their relative frequency, most frequent first, ties in alphabetical order."""
    ordered = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return [(piece, math.log(counts[piece] / counts.total())) for piece in ordered]
