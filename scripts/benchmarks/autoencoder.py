"""Encoding and decoding a clip beside diffusers' `AutoencoderKLWan`. Both compute in float32 on every device."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import ours, peers
from benchmarks.sizes import Sizes, VaeWork
from benchmarks.timing import Row, race

SUBJECT, PEER = "autoencoder", "diffusers' AutoencoderKLWan"


def measure(sizes: Sizes) -> Iterator[Row]:
    for work in sizes.vae:
        yield from measure_one(work, sizes)


def measure_one(work: VaeWork, sizes: Sizes) -> Iterator[Row]:
    model, peer = ours.autoencoder(work.base_dim), peers.autoencoder(work.base_dim, sizes)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (1, work.frames, work.height, work.width, 3)).astype(np.float32)
    latents = rng.standard_normal((1, (work.frames - 1) // 4 + 1, work.height // 8, work.width // 8, 16), np.float32)
    our_pixels, our_latents = jnp.asarray(pixels), jnp.asarray(latents)
    their_pixels, their_latents = (
        peers.tensor(peers.channels_first(x), sizes, torch.float32) for x in (pixels, latents)
    )
    yield race(
        SUBJECT,
        f"encode, {work}",
        lambda: jax.block_until_ready(model.encode(our_pixels)),
        PEER,
        peers.program(sizes, lambda: peer.encode(their_pixels).latent_dist.mode()),
        sizes.budget,
    )
    yield race(
        SUBJECT,
        f"decode, {work}",
        lambda: jax.block_until_ready(list(model.decode_in_chunks(our_latents))),
        PEER,
        peers.program(sizes, lambda: peer.decode(their_latents).sample),
        sizes.budget,
    )
