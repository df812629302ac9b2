"""Count the floating-point operations of a training step and of a sampling step, and know the peak of some chips.

Each multiply-add of a matrix product counts as two operations, no matter which kernel computes the product. Operations
that are repeated to save memory are counted separately. Norms, softmax and the objective are not matrix products and
are not counted. Nor is the product of A and B from which a DoRA gets its norms: it does not grow with the tokens.
"""

from typing import NamedTuple

from tfm_jax.config import LoraConfig, Remat, SamplingConfig
from tfm_jax.lora.adapters import adapter_sizes
from tfm_jax.wan.transformer import PATCH, TransformerConfig

_TEXT_LINEARS = ("cross_attn.k", "cross_attn.v")
"""Linear layers whose input is the text, which needs no gradient; the input of all others is the video."""


PEAKS = {
    "v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "tpu7x": 2307e12,
    "a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12,
}  # fmt: skip
"""Dense bfloat16 operations per second of a chip, from cloud.google.com/tpu/docs and NVIDIA's data sheets."""

_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "tpu7x", "NVIDIA A100-SXM4-40GB": "a100", "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200",
}  # fmt: skip
"""Kind of a JAX device -> key of `PEAKS`."""


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bfloat16 operations per second of a JAX device, which is half a chip on tpu7x; None if unknown.

    Args:
        device_kind: `device_kind` of the device, such as `TPU v5 lite`.
    """
    chip = _KINDS.get(device_kind)
    return PEAKS[chip] / (2 if chip == "tpu7x" else 1) if chip else None


class TrainingFlops(NamedTuple):
    """Number of operations of one training step, summed over all devices."""

    forward: int
    backward: int
    """Operations for the gradients of activations and adapters; frozen weights have no gradients."""
    recomputed: int
    """Forward operations that the remat policy repeats in the backward pass."""
    scores: int
    """Operations that the backward pass of attention repeats, because the attention scores are never saved."""

    @property
    def model(self) -> int:
        """Number of operations without those that are repeated."""
        return self.forward + self.backward


class _LinearLayer(NamedTuple):
    """A linear layer of a block, applied to `tokens` tokens per clip."""

    name: str
    in_dim: int
    out_dim: int
    tokens: int

    def kernel_flops(self) -> int:
        return 2 * self.tokens * self.in_dim * self.out_dim

    def adapter_flops(self, rank: int) -> tuple[int, int]:
        """Return the number of operations for the LoRA factor A and for B."""
        return 2 * self.tokens * rank * self.in_dim, 2 * self.tokens * rank * self.out_dim


def training_flops(config: TransformerConfig, lora: LoraConfig, remat: Remat, clips: int, tokens: int) -> TrainingFlops:
    """Count the operations of a training step.

    Args:
        clips: batch size, over all devices.
        tokens: number of video tokens per clip.
    """
    sizes = adapter_sizes(lora)
    attention = _attention(config, tokens, tokens + config.text_len)
    forward, backward = attention, 2 * attention
    for layer in _linear_layers(config, tokens):
        video_input = layer.name not in _TEXT_LINEARS
        forward += layer.kernel_flops()
        backward += layer.kernel_flops() if video_input else 0
        if layer.name in _TEXT_LINEARS and layer.name not in sizes:
            backward -= _attention(config, tokens, config.text_len) // 2  # these keys or values need no gradient
        if layer.name in sizes:
            a, b = layer.adapter_flops(sizes[layer.name].rank)
            forward += a + b
            backward += 2 * b + a + (a if video_input else 0)
    # The last linear layer is not recomputed, because its output is part of the saved input of the next block.
    last = _linear_layers(config, tokens)[-1]
    unneeded = last.kernel_flops() + (last.adapter_flops(sizes[last.name].rank)[1] if last.name in sizes else 0)
    recomputed = {"full": forward - unneeded, "none": 0}.get(remat, forward - unneeded - attention)
    text, stem, head = _outside_blocks(config, tokens)
    return TrainingFlops(
        clips * (config.layers * forward + text + stem + head),
        clips * (config.layers * backward + head),
        clips * config.layers * recomputed,
        clips * config.layers * attention // 2,
    )


def sampling_flops(config: TransformerConfig, clips: int, tokens: int, guided: bool) -> int:
    """Count the operations of a sampling step. Guidance evaluates each clip twice. Adapters are not counted."""
    block = _attention(config, tokens, tokens + config.text_len) + sum(
        layer.kernel_flops() for layer in _linear_layers(config, tokens)
    )
    return clips * (1 + guided) * (config.layers * block + sum(_outside_blocks(config, tokens)))


def video_flops(config: TransformerConfig, sampling: SamplingConfig, tokens: int) -> int:
    """Count the operations of the transformer for one video, over all steps. The small ones of the text encoder and the
    autoencoder are not counted."""
    first, last = (round(edge * sampling.steps) for edge in sampling.guidance_interval)
    guided = 0 if sampling.guidance == 1 else last - first
    with_guidance, without = (sampling_flops(config, 1, tokens, guided=each) for each in (True, False))
    return guided * with_guidance + (sampling.steps - guided) * without


def _attention(config: TransformerConfig, queries: int, keys: int) -> int:
    """Count the operations of one attention, forward: the scores and the weighted sums of the values."""
    return 4 * config.dim * queries * keys


def _linear_layers(config: TransformerConfig, tokens: int) -> list[_LinearLayer]:
    d, f = config.dim, config.ffn_dim
    video = [_LinearLayer(f"{part}.{name}", d, d, tokens) for part in ("self_attn", "cross_attn") for name in "qo"]
    keys = [_LinearLayer(f"self_attn.{name}", d, d, tokens) for name in "kv"]
    text = [_LinearLayer(name, d, d, config.text_len) for name in _TEXT_LINEARS]
    return [*video, *keys, *text, _LinearLayer("ffn.0", d, f, tokens), _LinearLayer("ffn.2", f, d, tokens)]


def _outside_blocks(config: TransformerConfig, tokens: int) -> tuple[int, int, int]:
    """Count the operations of the text embedding, of the patch and time embeddings together, and of the head."""
    d = config.dim
    patch = config.channels * PATCH[0] * PATCH[1] * PATCH[2]
    text = 2 * config.text_len * (config.text_dim + d) * d
    time = 2 * (config.freq_dim + d + 6 * d) * d
    return text, 2 * tokens * patch * d + time, 2 * tokens * d * patch
