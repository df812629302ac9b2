"""A sampling run: prompts.txt in, 000.mp4, 001.mp4, ... and a contact sheet out."""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from tqdm import tqdm

from tfm_jax import config as configs
from tfm_jax import video
from tfm_jax.arrays import Latents, Scalar, Text
from tfm_jax.config import section
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.files import Lora, read_lora
from tfm_jax.objective import timestep
from tfm_jax.sampling.solvers import euler, noise_levels
from tfm_jax.sharding import batch_sharding, make_mesh, split
from tfm_jax.wan import find_base, layouts, load_base, load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.parallel_attention import check_split
from tfm_jax.wan.tokenizer import encode_prompts
from tfm_jax.wan.transformer import WanTransformer, token_grid

PAIRS = "two b l d -> (b two) l d"


@section
class SampleRun:
    """The sections that sampling reads."""

    model: configs.ModelConfig
    clip: configs.ClipConfig
    sampling: configs.SamplingConfig
    mesh: configs.MeshConfig = dataclasses.field(default_factory=configs.MeshConfig)


@partial(jax.jit, static_argnames=("steps", "shift", "guidance", "on_step"))
def sample_latents(
    transformer: WanTransformer,
    noise: Latents,
    text: Text,
    negative: Text,
    *,
    steps: int = 50,
    shift: float = 5.0,
    guidance: float = 5.0,
    on_step: Callable[[], None] | None = None,
) -> Latents:
    """Latents of videos for `text`, led away from `negative`: the whole Euler loop as one compiled function.

    The velocity is `v(negative) + guidance (v(text) - v(negative))`; with guidance 1 only v(text) is computed.
    `on_step` is called on the host at every step. Under `jax.set_mesh` the videos are split as a batch is.
    """

    def velocity(x: Latents, sigma: Scalar) -> Latents:
        if on_step:
            jax.debug.callback(on_step)
        time = timestep(jnp.broadcast_to(sigma, x.shape[:1]))
        if guidance == 1:
            return transformer(x, time, text)
        # The two rows of a video are neighbours, so that they lie on one device.
        both = transformer(jnp.repeat(x, 2, axis=0), jnp.repeat(time, 2), rearrange([text, negative], PAIRS))
        with_text, without = rearrange(both, "(b two) f h w c -> two b f h w c", two=2)
        return without + guidance * (with_text - without)

    return euler(velocity, noise.astype(jnp.float32), noise_levels(steps, shift))


def sample(run: SampleRun) -> None:
    """Sample every prompt and write the videos into `run.sampling.output`, whole or not at all.

    The three networks are loaded one after another, so that only one is held at a time.

    Raises:
        InputError: a file is missing or does not fit the model, the mesh cannot be made or cannot split the video, or
            the output folder has something in it.
    """
    settings = run.sampling
    mesh = make_mesh(run.mesh)
    check_split(run.model.heads, math.prod(token_grid(_latent_size(run.clip))), mesh)
    prompts = read_prompts(settings.prompts)
    if settings.output.exists() and (not settings.output.is_dir() or any(settings.output.iterdir())):
        raise InputError(f"sampling.output={settings.output}: already there; expected a new or empty directory")
    lora = read_lora(settings.lora) if settings.lora else None
    find_base(run.model)  # what is missing is told before an hour of sampling, not after it
    layouts.find(run.model.path, layouts.VAE)

    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{settings.output.name}.", dir=settings.output.parent) as scratch:
        folder = Path(scratch, "samples")
        folder.mkdir()
        _sample_into(folder, run, prompts, lora, mesh)
        folder.replace(settings.output)


def _sample_into(folder: Path, run: SampleRun, prompts: list[str], lora: Lora | None, mesh: Mesh) -> None:
    settings = run.sampling
    text = _embed(run, [*prompts, settings.negative_prompt])
    transformer = _transformer(run, lora, mesh)
    shape = (*_latent_size(run.clip), transformer.config.channels)
    # As many videos at a time as the mesh splits the batch into; what is missing in the last round are copies of its
    # last video, so that there is one program.
    together, last = split("batch", mesh), len(prompts) - 1
    rounds = [[min(first + n, last) for n in range(together)] for first in range(0, len(prompts), together)]
    key = jax.random.key(settings.seed)
    latents = []
    with tqdm(total=len(rounds) * settings.steps, desc="sampling", unit="step") as bar, jax.set_mesh(mesh):

        def on_step() -> None:
            bar.update()

        for numbers in rounds:
            noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float32) for n in numbers])
            rows = (noise, text[np.array(numbers)], jnp.repeat(text[-1:], together, axis=0))
            result = sample_latents(
                transformer, *jax.device_put(rows, batch_sharding(mesh)),
                steps=settings.steps, shift=settings.shift, guidance=settings.guidance, on_step=on_step,
            )  # fmt: skip
            latents += [latent[None] for latent in np.asarray(result)[: len(set(numbers))]]
    del transformer

    configs.dump(run, folder / "config.yaml")
    _write(folder, run, prompts, latents)


def _latent_size(clip: configs.ClipConfig) -> tuple[int, int, int]:
    return (clip.frames - 1) // 4 + 1, clip.height // 8, clip.width // 8


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        InputError: there is no such file, it is not text, or it has no prompt.
    """
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"sampling.prompts={file}: {error.strerror}; expected a text file, a prompt a line") from None
    except UnicodeDecodeError:
        raise InputError(f"sampling.prompts={file}: not UTF-8 text; expected a prompt a line") from None
    if not prompts:
        raise InputError(f"sampling.prompts={file}: no prompt in it; expected a prompt a line")
    return prompts


def _embed(run: SampleRun, prompts: list[str]) -> Text:
    tokenizer = load_tokenizer(run.model.path)
    encoder = load_text_encoder(run.model.path, run.model.dtype)
    return jnp.concatenate([encode_prompts(tokenizer, encoder, [prompt]) for prompt in prompts])


def _transformer(run: SampleRun, lora: Lora | None, mesh: Mesh) -> WanTransformer:
    transformer = load_base(run.model, mesh)
    if lora:
        try:
            load_adapters(transformer, lora, mesh)
        except InputError as error:
            raise InputError(f"sampling.lora={run.sampling.lora}: {error}") from None
    return transformer


def _write(folder: Path, run: SampleRun, prompts: list[str], latents: list[np.ndarray]) -> None:
    vae = load_vae(run.model.path)
    clips = []
    for number, latent in enumerate(tqdm(latents, desc="decoding", unit="clip")):
        pixels = np.asarray(vae.decode(jnp.asarray(latent)))[0]
        clips.append(video.to_uint8(pixels))
        video.write_clip(folder / f"{number:03d}.mp4", clips[-1], run.clip.fps)
    video.contact_sheet(clips, prompts).save(folder / "contact_sheet.png")
