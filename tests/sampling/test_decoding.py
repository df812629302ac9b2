"""Decoding frame by frame and tile by tile."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import virtual_devices
from helpers.paths import WAN_TINY

from tfm_jax.moving_shapes.world import make_scene
from tfm_jax.sampling import decoding
from tfm_jax.sampling.decoding import decode_frames, tile_starts
from tfm_jax.video import from_uint8
from tfm_jax.wan import load_vae
from tfm_jax.wan.vae import Decoder, VaeConfig, WanVae


@pytest.fixture(scope="module")
def vae():
    return load_vae(WAN_TINY)


def joined(chunks) -> np.ndarray:
    return np.concatenate(list(chunks), axis=1)


def latents_of(seed: int, *size: int) -> np.ndarray:
    return np.array(jax.random.normal(jax.random.key(seed), size))


def test_frame_by_frame_is_the_whole_video_and_compiles_once(vae, monkeypatch):
    call, traces = Decoder.__call__, []
    monkeypatch.setattr(Decoder, "__call__", lambda self, *rest: (traces.append(1), call(self, *rest))[1])
    latents = latents_of(0, 1, 4, 4, 2, 16)
    chunks = list(decode_frames(vae, latents))
    assert [chunk.shape[1] for chunk in chunks] == [1, 4, 4, 4]
    assert len(traces) == 2  # the first frame, and all others
    longer = joined(decode_frames(vae, np.concatenate([latents, latents], axis=1)))
    assert len(traces) == 2
    np.testing.assert_allclose(longer[:, :13], joined(chunks), atol=1e-6)
    np.testing.assert_allclose(joined(chunks), vae.decode(jnp.asarray(latents)), atol=1e-5)


def test_tiles_are_those_of_the_release():
    assert tile_starts(60, 30) == [0, 15, 30]
    assert tile_starts(104, 52) == [0, 26, 52]
    assert tile_starts(56, 30) == [0, 15, 26]  # all tiles have the same size
    assert tile_starts(30, 30) == [0]


class Enlarging(WanVae):
    """A fake autoencoder, whose pixels depend on the latents at the same place only."""

    def __init__(self):
        self.config = VaeConfig()

    def decode_in_chunks(self, latents):
        for frame in range(latents.shape[1]):
            pixels = jnp.repeat(jnp.repeat(latents[:, frame : frame + 1, ..., :3], 8, axis=2), 8, axis=3)
            yield jnp.repeat(pixels, 4 if frame else 1, axis=1)


@pytest.mark.parametrize("tile", [(4, 6), (5, 4), (2, 100)])
def test_blending_keeps_what_does_not_depend_on_tiles(tile):
    latents = latents_of(1, 2, 3, 9, 11, 16)
    [tiled] = decode_frames(Enlarging(), latents, tile)
    np.testing.assert_allclose(tiled, joined(decode_frames(Enlarging(), latents)), atol=1e-6)


def test_weights_rise_over_the_overlap():
    """Like the masks of the release: (i + 1) / overlap, only where there is a neighbour."""
    rise = np.arange(1, 9) / 8
    np.testing.assert_allclose(decoding._ramp(0, 2, 6, 8), [*np.ones(8), *rise[::-1]])
    np.testing.assert_allclose(decoding._ramp(2, 2, 6, 8), [*rise, *rise[::-1]])
    np.testing.assert_allclose(decoding._ramp(4, 2, 6, 8), [*rise, *np.ones(8)])


def test_tiles_are_close_to_the_whole(vae):
    """They cannot be equal: in the middle of the decoder, attention spans the whole frame."""
    pixels = make_scene(np.random.default_rng(3), frames=5, size=(128, 128)).pixels
    latents = np.asarray(vae.encode(jnp.asarray(from_uint8(pixels))[None]))
    whole = joined(decode_frames(vae, latents))
    [tiled] = decode_frames(vae, latents, (8, 8))
    error = np.mean(np.square((whole - tiled) / 2))
    assert -10 * np.log10(error) >= 45
    large = joined(decode_frames(vae, latents, (16, 20)))
    np.testing.assert_array_equal(large, whole)


PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from tfm_jax.sampling.decoding import decode_frames
from tfm_jax.wan import load_vae

def memory(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def decode(frames):
    latents = np.random.default_rng(0).standard_normal((1, 1 + (frames - 1) // 4, 32, 48, 16), np.float32)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in decode_frames(vae, latents):
        pass
    return memory("VmHWM") - before

vae = load_vae(sys.argv[1])
before = memory("VmRSS")
decode(5)  # compiles the two programs
print(decode(9), decode(81))
"""
"""Program that prints the peak of the memory for decoding 9 and 81 frames of 256 x 384 pixels."""


@pytest.mark.slow
def test_81_frames_take_the_memory_of_9():
    # A fixed threshold makes malloc return large blocks at once; otherwise it keeps some, more with every call.
    environment = virtual_devices.environment(1) | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", PEAK, str(WAN_TINY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nine, eighty_one = map(int, done.stdout.split())
    assert nine > 80e6  # more than 81 frames as bytes, 24 MB
    assert eighty_one <= 1.2 * nine
