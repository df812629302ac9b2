"""A small tokenizer of T5's kind, made from a corpus on the spot, for the embedded model and the tests."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import T5Tokenizer

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def write_tokenizer(directory: str | Path, corpus: Iterable[str], vocab_size: int) -> None:
    """Save a Unigram tokenizer of at most `vocab_size` pieces in the files of `T5TokenizerFast`.

    Ids 0, 1 and 2 are `<pad>`, `</s>` and `<unk>`; a word begins with T5's "▁". Pieces are the characters and the
    words of the corpus, the most frequent ones as far as there is room, scored by the logarithm of their frequency:
    nothing is drawn or searched, so that the same corpus always gives the same ids. Anything else becomes `<unk>`.
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
    """Every piece with the logarithm of its share, most frequent first, equal ones in alphabetical order."""
    ordered = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return [(piece, math.log(counts[piece] / counts.total())) for piece in ordered]
