"""DiffSynth-Studio's pipeline for Wan, with our weights.

The Makefile installs DiffSynth without its dependencies, because some of them are large. It imports four that the code
for Wan2.1 does not use, except to download weights and to write videos; empty modules stand in for these.
"""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from einops import rearrange
from transformers import Wav2Vec2Processor  # noqa: F401, so that transformers looks for torchvision before DiffSynth

from tfm_jax.wan.components import TEXT_ENCODER, TRANSFORMER, VAE, Component
from tfm_jax.wan.sources import find_source
from tfm_jax.wan.transformer import TransformerConfig

STOOD_IN = ("imageio", "imageio.v3", "modelscope", "pandas", "torchvision", "torchvision.transforms")


class _Empty(ModuleType):
    """A package in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@functools.cache
def wan_video() -> ModuleType:
    """Import and return `diffsynth.pipelines.wan_video`."""
    absent = [name for name in STOOD_IN if importlib.util.find_spec(name.partition(".")[0]) is None]
    sys.modules.update({name: _Empty(name) for name in absent})
    try:
        importlib.import_module("diffsynth.utils.data")
        return importlib.import_module("diffsynth.pipelines.wan_video")
    finally:
        for name in absent:  # so that nothing else takes them for the real ones
            del sys.modules[name]


def original_tensors(model: Path, component: Component) -> dict[str, torch.Tensor]:
    """Return the tensors of a network in float32, with original names."""
    source, tensors = find_source(model, component), {}
    for row in component.rows(source.config):
        pattern = f"{' '.join(row.our_axes)} -> {' '.join(row.torch_axes)}"
        value = rearrange(source.read(row).astype(np.float32), pattern)
        tensors[row.original] = torch.from_numpy(np.ascontiguousarray(value))
    return tensors


def transformer(config: TransformerConfig, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return DiffSynth's transformer with these weights."""
    model = wan_video().WanModel(
        dim=config.dim,
        in_dim=config.channels,
        ffn_dim=config.ffn_dim,
        out_dim=config.channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        eps=config.eps,
        patch_size=(1, 2, 2),
        num_heads=config.heads,
        num_layers=config.layers,
        has_image_input=False,
    )
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def networks(model: Path) -> dict[str, torch.nn.Module]:
    """Return the three networks of a model, under the names that DiffSynth gives them."""
    text, vae = (find_source(model, component).config for component in (TEXT_ENCODER, VAE))
    module = wan_video()
    encoder = module.WanTextEncoder(
        vocab=text.vocab_size,
        dim=text.dim,
        dim_attn=text.heads * text.head_dim,
        dim_ffn=text.ffn_dim,
        num_heads=text.heads,
        num_layers=text.layers,
        num_buckets=text.buckets,
    )
    encoder.load_state_dict(original_tensors(model, TEXT_ENCODER))
    with torch.device("meta"):
        autoencoder = module.WanVideoVAE()  # of Wan2.1's size, which takes long to fill with random numbers
    inner = importlib.import_module("diffsynth.models.wan_video_vae").VideoVAE_
    autoencoder.model = inner(
        dim=vae.base_dim,
        z_dim=vae.z_dim,
        dim_mult=list(vae.dim_mult),
        num_res_blocks=vae.num_res_blocks,
        temperal_downsample=list(vae.temporal_downsample),
    )
    autoencoder.model.load_state_dict(original_tensors(model, VAE))
    autoencoder.mean, autoencoder.std = torch.tensor(vae.latents_mean), torch.tensor(vae.latents_std)
    autoencoder.scale = [autoencoder.mean, 1 / autoencoder.std]
    return {
        "wan_video_dit": transformer(find_source(model, TRANSFORMER).config, original_tensors(model, TRANSFORMER)),
        "wan_video_text_encoder": encoder.eval().requires_grad_(False),
        "wan_video_vae": autoencoder.eval().requires_grad_(False),
    }


def run(model: torch.nn.Module, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the velocity that DiffSynth predicts, `b f h w c`."""
    latents = torch.from_numpy(rearrange(batch["latents"], "b f h w c -> b c f h w")).contiguous()
    timestep, text = torch.from_numpy(batch["timestep"]), torch.from_numpy(batch["text"])
    with torch.no_grad():
        out = wan_video().model_fn_wan_video(dit=model, latents=latents, timestep=timestep, context=text)
    return rearrange(out.numpy(), "b c f h w -> b f h w c")
