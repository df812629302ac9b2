"""What the benchmarks measure on a CPU and on a GPU: the sizes of the networks and of their inputs."""

import math
from typing import NamedTuple

from tfm_jax.arrays import Dtype
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.transformer import TransformerConfig, token_grid


class Work(NamedTuple):
    """A transformer and a batch of latents."""

    config: TransformerConfig
    batch: int
    size: tuple[int, int, int]
    """Frames, height and width of the latents."""
    rank: int = 32

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.batch, *self.size, self.config.channels

    @property
    def tokens(self) -> int:
        """Number of tokens of one clip."""
        return math.prod(token_grid(self.size))

    def __str__(self) -> str:
        sizes = f"width {self.config.dim}, {self.config.layers} layers"
        return f"{sizes}, batch {self.batch} of {self.tokens:,} tokens, rank {self.rank}"


class VaeWork(NamedTuple):
    """An autoencoder and a clip."""

    base_dim: int
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"base width {self.base_dim}, {self.frames} frames of {self.height} x {self.width}"


class TextWork(NamedTuple):
    """A text encoder and a batch of prompts."""

    config: TextEncoderConfig
    batch: int
    tokens: int

    def __str__(self) -> str:
        sizes = f"width {self.config.dim}, {self.config.layers} layers"
        return f"{sizes}, batch {self.batch} of {self.tokens} tokens"


class Sizes(NamedTuple):
    device: str
    dtype: Dtype
    budget: float
    """Seconds after which the rounds of a comparison end, if there were enough of them."""
    objective: tuple[int, int, int, int]
    """Frames, height, width and channels of the latents."""
    training: tuple[Work, ...]
    sampling: tuple[Work, ...]
    sampling_steps: int
    vae: tuple[VaeWork, ...]
    text: tuple[TextWork, ...]
    files: TransformerConfig
    attention: tuple[tuple[int, int, int, int, int], ...]
    """Batch size, number of queries, number of keys, number of heads, head width."""
    growth: Work
    startup: Work


WAN_1_3B = TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=30)
WAN_14B = TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)

_TINY = TransformerConfig(dim=128, ffn_dim=512, heads=4, layers=8, text_dim=64)
_SMALL = TransformerConfig(dim=256, ffn_dim=1024, heads=4, layers=4, text_dim=256)
_MEDIUM = TransformerConfig(dim=512, ffn_dim=2048, heads=8, layers=8, text_dim=512)
_TEXT = TextEncoderConfig(vocab_size=4096, dim=512, heads=8, head_dim=64, ffn_dim=1280, layers=8)
_480P = (21, 60, 104)

CPU = Sizes(
    device="cpu",
    dtype="float32",
    budget=5,
    objective=(*_480P, 16),
    training=(Work(_TINY, 8, (5, 8, 8), 16), Work(_MEDIUM, 1, (4, 40, 40))),
    sampling=(Work(_TINY, 1, (5, 8, 8), 16), Work(_MEDIUM, 1, (4, 40, 40))),
    sampling_steps=3,
    vae=(VaeWork(32, 17, 128, 128), VaeWork(96, 5, 64, 96)),
    text=(TextWork(_TEXT, 1, 512), TextWork(_TEXT, 8, 64)),
    files=TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=6),
    attention=((1, 1600, 1600, 8, 64), (1, 1600, 512, 8, 64), (2, 80, 512, 4, 32)),
    growth=Work(_SMALL, 1, (2, 32, 32)),
    startup=Work(_TINY, 8, (5, 8, 8), 16),
)

GPU = Sizes(
    device="gpu",
    dtype="bfloat16",
    budget=20,
    objective=(*_480P, 16),
    training=(Work(WAN_1_3B, 1, _480P), Work(WAN_14B, 1, _480P)),
    sampling=(Work(WAN_1_3B, 1, _480P), Work(WAN_14B, 1, _480P)),
    sampling_steps=4,
    vae=(VaeWork(96, 17, 480, 832),),
    text=(TextWork(TextEncoderConfig(), 1, 512),),
    files=WAN_1_3B,
    attention=((1, 32760, 32760, 12, 128), (1, 32760, 512, 12, 128)),
    growth=Work(TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=8), 1, (5, 60, 104)),
    startup=Work(WAN_1_3B, 1, (5, 60, 104)),
)

SIZES = {sizes.device: sizes for sizes in (CPU, GPU)}
