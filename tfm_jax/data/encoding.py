"""Encodes clips and prompts into records: the autoencoder on all devices of a process, the text encoder on one."""

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float, UInt8

from tfm_jax import config as configs
from tfm_jax import video
from tfm_jax.arrays import DTYPES, Dtype, Latents
from tfm_jax.data.format import Record
from tfm_jax.sharding import batch_sharding, local_mesh, one_device_mesh
from tfm_jax.wan import load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.components import TEXT_ENCODER, VAE
from tfm_jax.wan.fingerprint import fingerprint_source
from tfm_jax.wan.sources import find_source
from tfm_jax.wan.tokenizer import encode_prompts

Item = TypeVar("Item")

PROMPTS_KEPT = 64
"""Number of prompts whose embeddings are kept. Each takes up to 8 MB."""


class Encoding(NamedTuple):
    """What is known about the encoders of a model before their weights are loaded."""

    fingerprints: dict[str, str]
    """Name of the encoder -> fingerprint of its weights."""
    channels: int
    """Number of latent channels."""
    text_dim: int
    """Width of the text embeddings."""


def find_encoders(model: Path) -> Encoding:
    """Find the encoders in the directory of a model.

    Raises:
        InputError: one of them is missing or damaged.
    """
    vae, text_encoder = (find_source(model, component) for component in (VAE, TEXT_ENCODER))
    fingerprints = {source.component.name: fingerprint_source(source) for source in (vae, text_encoder)}
    return Encoding(fingerprints, vae.config.z_dim, text_encoder.config.dim)


class Encoders:
    """The encoders of a model, loaded onto the devices of this process.

    Raises:
        InputError: the model is not as expected.
    """

    def __init__(self, model: configs.ModelConfig):
        self._tokenizer = load_tokenizer(model.path)
        self._text_encoder = load_text_encoder(model.path, model.dtype, one_device_mesh())
        mesh = local_mesh()
        self._vae = load_vae(model.path, mesh=mesh)
        self._split = batch_sharding(mesh)
        self._encode = jax.jit(
            jax.shard_map(
                lambda vae, pixels: vae.encode(video.from_uint8(pixels)),
                mesh=mesh,
                in_specs=(jax.sharding.PartitionSpec(), self._split.spec),
                out_specs=self._split.spec,
                check_vma=False,
            )
        )
        self.clips_per_call: int = mesh.size
        self.text = functools.lru_cache(PROMPTS_KEPT)(self._text)

    def _text(self, prompt: str) -> Float[np.ndarray, "l d"]:
        """Return the embedding of a prompt, one row per token, without padding."""
        [text] = encode_prompts(self._tokenizer, self._text_encoder, [prompt])
        return text

    def latents(self, clips: Sequence[UInt8[np.ndarray, "t y x 3"]]) -> Latents:
        """Start to encode up to `clips_per_call` clips of one size, each on its own device.

        The program that a device runs does not depend on the number of devices. The result has `clips_per_call` rows:
        the last clip is repeated on devices that would have none.
        """
        filled = [*clips, *[clips[-1]] * (self.clips_per_call - len(clips))]
        return self._encode(self._vae, jax.device_put(np.stack(filled), self._split))


class Unencoded(NamedTuple):
    """A clip to encode."""

    video: str
    prompt: str
    pixels: UInt8[np.ndarray, "t y x 3"]


def encode(clips: Iterable[Unencoded], encoders: Encoders, dtype: Dtype) -> Iterator[Record]:
    """Encode clips in their order. While the devices encode the next ones, the caller can write the records.

    One call of the autoencoder encodes successive clips of the same size.
    """
    stored = DTYPES[dtype]

    def start(group: list[Unencoded]) -> tuple[list[Unencoded], list[np.ndarray], Latents]:
        texts = [encoders.text(clip.prompt).astype(stored) for clip in group]
        return group, texts, encoders.latents([clip.pixels for clip in group])

    for group, texts, latents in _one_ahead(map(start, _groups(clips, encoders.clips_per_call))):
        for clip, text, values in zip(group, texts, np.asarray(latents).astype(stored), strict=False):
            yield Record(values, text, clip.prompt, clip.video)


def _groups(clips: Iterable[Unencoded], size: int) -> Iterator[list[Unencoded]]:
    """Yield up to `size` successive clips of the same size at a time."""
    for _, same in itertools.groupby(clips, lambda clip: clip.pixels.shape):
        while group := list(itertools.islice(same, size)):
            yield group


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, each after the next one has been taken."""
    taken: deque[Item] = deque()
    for item in items:
        taken.append(item)
        if len(taken) > 1:
            yield taken.popleft()
    yield from taken
