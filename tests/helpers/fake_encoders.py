"""Encoders that take no time: the latents are the mean colour of a clip, the text embedding tells the prompts apart."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.config import ModelConfig, latent_size
from tfm_jax.data import prepare as prepare_module
from tfm_jax.data.encoding import Encoders, Encoding

CHANNELS, TEXT_DIM = 16, 8


class FakeEncoders(Encoders):
    """Encodes two clips at a time, as on two devices."""

    calls: ClassVar[list[int]] = []
    """Number of clips in each call of the last encoders."""

    def __init__(self, model: ModelConfig):
        self.clips_per_call = 2
        self.calls.clear()

    def text(self, prompt: str) -> np.ndarray:
        return np.full((1 + len(prompt), TEXT_DIM), sum(map(ord, prompt)), np.float32)

    def latents(self, clips: Sequence[np.ndarray]) -> jax.Array:
        self.calls.append(len(clips))
        filled = [*clips, *[clips[-1]] * (self.clips_per_call - len(clips))]
        shape = (*latent_size(*clips[0].shape[:3]), CHANNELS)
        return jnp.stack([jnp.full(shape, clip.mean(dtype=np.float32)) for clip in filled])


def use_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `prepare` use these encoders, which need no model."""
    found = Encoding({"vae": "0" * 16, "text_encoder": "1" * 16}, CHANNELS, TEXT_DIM)
    monkeypatch.setattr(prepare_module, "find_encoders", lambda model: found)
    monkeypatch.setattr(prepare_module, "Encoders", FakeEncoders)
