"""The embedded model as it ships: its size, its quality, and the same videos from diffusers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from helpers.paths import WAN_TINY

from tfm_jax.arrays import pad_text
from tfm_jax.config import load
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.files import Adapter, Lora, read_lora, write_lora
from tfm_jax.moving_shapes.evaluation.clip_metrics import measure_clip
from tfm_jax.moving_shapes.pretraining.autoencoder import psnr
from tfm_jax.moving_shapes.scene import LAWS
from tfm_jax.moving_shapes.world import make_scene
from tfm_jax.sampling import sample_latents
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.video import to_uint8
from tfm_jax.wan import find_base, load_base, load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.names import BLOCK_LINEARS, BlockLinear
from tfm_jax.wan.tokenizer import encode_prompts

MODEL = WAN_TINY
RUN = load(SampleRun, "wan_tiny")
PROMPTS = [
    "a red disc moves right, fast, on a black ground",
    "a yellow square moves down and left, slowly, on a navy ground",
    "a blue triangle stands still, on a grey ground",
    "a white disc moves up, fast, on a grey ground",
]


def draw_noise(seed: int, videos: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (videos, 5, 8, 8, 16))


@pytest.fixture(scope="module")
def text() -> jax.Array:
    encoder = load_text_encoder(MODEL, jnp.float32)
    embeddings = encode_prompts(load_tokenizer(MODEL), encoder, [*PROMPTS, ""])
    return jnp.asarray(pad_text(embeddings, find_base(RUN.model).config.text_len))


@pytest.fixture(scope="module")
def transformer():
    return load_base(RUN.model)


def test_it_is_small_and_fits_its_configuration():
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 20e6
    find_base(RUN.model)


def test_the_autoencoder_on_clips_at_held_out_speeds():
    laws = list(LAWS)
    clips = [
        make_scene(np.random.default_rng((7, n)), laws=[laws[n % len(laws)]], held_out=True).pixels for n in range(18)
    ]
    assert psnr(load_vae(MODEL), np.stack(clips)) >= 32


def test_samples_show_what_the_captions_say(transformer, text):
    """Eight samples of four captions. Guessing would be right in one case of six to eight."""
    captions = [*PROMPTS, *PROMPTS]
    embedded = jnp.concatenate([text[:-1], text[:-1]])
    negative = jnp.broadcast_to(text[-1:], embedded.shape)
    latents = sample_latents(transformer, draw_noise(3, len(captions)), embedded, negative, steps=20)
    vae = load_vae(MODEL)
    found = [
        measure_clip(to_uint8(np.asarray(vae.decode(x[None]))[0]), caption, 16)
        for x, caption in zip(latents, captions, strict=True)
    ]
    shares = {name: np.mean([getattr(m, name) for m in found]) for name in ("colours", "directions", "whole")}
    assert min(shares.values()) >= 0.6, shares


@pytest.fixture
def lora(tmp_path) -> Path:
    """A LoRA on every linear layer, drawn at random, large enough to change the video."""
    rng, rank = np.random.default_rng(0), 4
    config = RUN.model
    adapters = {}
    for layer in range(config.layers):
        for name in BLOCK_LINEARS:
            width_in = config.ffn_dim if name == "ffn.2" else config.dim
            width_out = config.ffn_dim if name == "ffn.0" else config.dim
            a = rng.normal(size=(rank, width_in)) / np.sqrt(width_in)
            b = 0.2 * rng.normal(size=(width_out, rank))
            adapters[BlockLinear(layer, name)] = Adapter(np.float32(a), np.float32(b))
    write_lora(tmp_path / "lora.safetensors", Lora(adapters, rank, float(rank)), dtype=np.dtype(np.float32))
    return tmp_path / "lora.safetensors"


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean(np.square(np.float64(a) - np.float64(b)))))


def test_diffusers_makes_the_same_videos(transformer, text, lora):
    """`WanPipeline` loads the directory unchanged and samples 20 steps from the same noise, without and with a LoRA."""
    noise = draw_noise(5, 1)
    pipeline = WanPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def ours(transformer) -> np.ndarray:
        latents = sample_latents(transformer, noise, text[:1], text[-1:], steps=20, guidance=5.0)
        return np.asarray(load_vae(MODEL).decode(latents))[0] / 2 + 0.5

    def theirs() -> np.ndarray:
        return pipeline(
            PROMPTS[0], height=64, width=64, num_frames=17, num_inference_steps=20, guidance_scale=5.0,
            output_type="np", max_sequence_length=text.shape[1],
            latents=torch.from_numpy(np.array(noise)).permute(0, 4, 1, 2, 3),
        ).frames[0]  # fmt: skip

    plain = ours(transformer)
    assert decibels(plain, theirs()) >= 40
    adapted = load_base(RUN.model)
    load_adapters(adapted, read_lora(lora))
    pipeline.load_lora_weights(lora)
    with_lora = theirs()
    agreement = decibels(ours(adapted), with_lora)
    assert agreement >= 40
    assert decibels(plain, with_lora) < agreement - 10  # the LoRA does something
