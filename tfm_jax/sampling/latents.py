"""Latents in files, in the layout of diffusers, and the initial noise of a run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from tfm_jax import files
from tfm_jax.config import SamplingConfig
from tfm_jax.errors import InputError
from tfm_jax.wan.tensors import open_safetensors

NAME = "latents"
"""Name of the tensor `[videos, channels, frames, height, width]` in a file."""


def write_latents(file: Path, latents: Float[np.ndarray, "b f h w c"]) -> None:
    """Write a safetensors file, which `read_latents` and diffusers can use."""
    with files.replacing(file) as scratch:
        save_file({NAME: np.ascontiguousarray(rearrange(latents, "b f h w c -> b c f h w"))}, scratch)


def read_latents(file: Path, size: tuple[int, int, int, int]) -> Float[np.ndarray, "b f h w c"]:
    """Read the latents of videos as float32.

    Args:
        size: the frames, height, width and channels that they must have.

    Raises:
        InputError: the file is missing or damaged, or has other tensors, another size or values that are not finite.
    """
    tensors = open_safetensors(file)
    frames, height, width, channels = size
    expected = f"expected one tensor {NAME}, [videos, {channels}, {frames}, {height}, {width}]"
    if list(tensors) != [NAME]:
        raise InputError(f"{file}: contains {', '.join(tensors) or 'no tensors'}; {expected}")
    shape = tensors[NAME].shape
    if len(shape) != 5 or not shape[0] or shape[1:] != (channels, frames, height, width):
        raise InputError(f"{file}: the tensor has shape {list(shape)}; {expected}")
    values = np.asarray(tensors[NAME].read(...), np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{file}: contains NaN or infinite values; expected finite latents")
    return rearrange(values, "b c f h w -> b f h w c")


def draw_noise(settings: SamplingConfig, prompt: int, repeat: int, size: tuple[int, ...]) -> Float[Array, "f h w c"]:
    """Draw the initial noise of one video. It depends only on the seed, the number of the prompt and `repeat`.

    Args:
        repeat: number of the video among those of the prompt.
    """
    key = jax.random.key(settings.seed + repeat)
    number = 0 if settings.noise == "shared" else prompt
    return jax.random.normal(jax.random.fold_in(key, number), size, jnp.float32)
