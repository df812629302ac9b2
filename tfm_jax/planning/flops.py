"""Floating-point operations of a training step and of a sampling step: two for each multiply-add of a matrix product.

Counted are the products that the mathematics needs, whatever computes them, and apart from these what is computed again
to save memory. Norms, softmax and the objective are left out: they are no matrix products.
"""

from typing import NamedTuple

from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.config import LoraConfig, Remat
from tfm_jax.lora.adapters import target_linears
from tfm_jax.wan.transformer import PATCH, TransformerConfig

_TEXT = ("cross_attn.k", "cross_attn.v")
"""Maps that see the text, which needs no gradient; all others see the video."""


class TrainingFlops(NamedTuple):
    """Of one step, over all devices."""

    forward: int
    backward: int
    """Gradients of activations and of adapters. Frozen weights have none."""
    recomputed: int
    """What the remat policy makes the backward pass compute again."""
    scores: int
    """What attention's backward pass computes again of its scores, which are never kept."""

    @property
    def model(self) -> int:
        return self.forward + self.backward


class _Map(NamedTuple):
    """A linear map of a block, and the tokens of a clip that go through it."""

    name: str
    ins: int
    outs: int
    tokens: int

    def kernel(self) -> int:
        return 2 * self.tokens * self.ins * self.outs

    def factors(self, rank: int) -> tuple[int, int]:
        """Of A and of B."""
        return 2 * self.tokens * rank * self.ins, 2 * self.tokens * rank * self.outs


def training_flops(
    config: TransformerConfig, lora: LoraConfig, remat: Remat, clips: int, tokens: int, *, score_passes: int = 1
) -> TrainingFlops:
    """Of a step on `clips` clips of so many `tokens` each.

    Args:
        score_passes: products as large as the scores that attention's backward pass makes again: 1 where one kernel
            makes all gradients (cuDNN, chunked), 3 where queries and keys have one each (splash).
    """
    targets = target_linears(lora.targets)
    attention = _attention(config, tokens, tokens + TEXT_LENGTH)
    forward, backward = attention, 2 * attention
    for layer in _maps(config, tokens):
        of_video = layer.name not in _TEXT
        forward += layer.kernel()
        backward += layer.kernel() if of_video else 0
        if layer.name in _TEXT and layer.name not in targets:
            backward -= _attention(config, tokens, TEXT_LENGTH) // 2  # nothing learns from this side of attention
        if layer.name in targets:
            a, b = layer.factors(lora.rank)
            forward += a + b
            backward += 2 * b + a + (a if of_video else 0)
    last = _maps(config, tokens)[-1]  # of its result only the sum with the block's input is needed, the next block's
    unneeded = last.kernel() + (last.factors(lora.rank)[1] if last.name in targets else 0)
    again = {"full": forward - unneeded, "none": 0}.get(remat, forward - unneeded - attention)
    text, stem, head = _outside(config, tokens)
    return TrainingFlops(
        clips * (config.layers * forward + text + stem + head),
        clips * (config.layers * backward + head),
        clips * config.layers * again,
        clips * config.layers * score_passes * attention // 2,
    )


def sampling_flops(config: TransformerConfig, clips: int, tokens: int, guided: bool) -> int:
    """Of a step for `clips` clips, each computed twice with guidance. Adapters are left out."""
    block = _attention(config, tokens, tokens + TEXT_LENGTH) + sum(layer.kernel() for layer in _maps(config, tokens))
    return clips * (1 + guided) * (config.layers * block + sum(_outside(config, tokens)))


def _attention(config: TransformerConfig, queries: int, keys: int) -> int:
    """Scores and weighted sums of a block, forward."""
    return 4 * config.dim * queries * keys


def _maps(config: TransformerConfig, tokens: int) -> list[_Map]:
    d, f = config.dim, config.ffn_dim
    video = [_Map(f"{part}.{name}", d, d, tokens) for part in ("self_attn", "cross_attn") for name in "qo"]
    keys = [_Map(f"self_attn.{name}", d, d, tokens) for name in "kv"]
    text = [_Map(name, d, d, TEXT_LENGTH) for name in _TEXT]
    return [*video, *keys, *text, _Map("ffn.0", d, f, tokens), _Map("ffn.2", f, d, tokens)]


def _outside(config: TransformerConfig, tokens: int) -> tuple[int, int, int]:
    """Of the text and of patches and time before the blocks, and of the head behind them."""
    d = config.dim
    patch = config.channels * PATCH[0] * PATCH[1] * PATCH[2]
    text = 2 * TEXT_LENGTH * (config.text_dim + d) * d
    time = 2 * (config.freq_dim + d + 6 * d) * d
    return text, 2 * tokens * patch * d + time, 2 * tokens * d * patch
