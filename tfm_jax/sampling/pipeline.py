"""A sampling run: from a prompt file to 000.mp4, 001.mp4, ... and a contact sheet."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from tqdm import tqdm

from tfm_jax import config as configs
from tfm_jax import console, interrupts, video
from tfm_jax.arrays import Latents, Scalar, Text, pad_text
from tfm_jax.config.reading import shown
from tfm_jax.errors import InputError, StoppedEarly
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.applying import check_fits, weight_change
from tfm_jax.lora.combining import parse_choice, read_loras
from tfm_jax.lora.files import Lora
from tfm_jax.objective import timestep
from tfm_jax.prompts import read_prompts
from tfm_jax.sampling.outputs import SampleRun, Samples, fingerprint_loras, fingerprint_weights
from tfm_jax.sampling.solvers import euler, noise_levels
from tfm_jax.sharding import batch_sharding, check_split, constrain, make_mesh, num_shards, replicated
from tfm_jax.wan import find_base, load_base, load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.checks import check_source
from tfm_jax.wan.components import TEXT_ENCODER, VAE, abstract_parameters
from tfm_jax.wan.sources import find_source
from tfm_jax.wan.tokenizer import encode_prompts, find_tokenizer
from tfm_jax.wan.transformer import WanTransformer, token_grid
from tfm_jax.wan.vae import WanVae

PAIRS = "two b l d -> (b two) l d"


# --- Latents ---------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="guidance")
def guided_velocity(
    transformer: WanTransformer, x: Latents, sigma: Scalar, text: Text, negative: Text, *, guidance: float
) -> Latents:
    """Return the velocity `v(negative) + guidance (v(text) - v(negative))`. If guidance is 1, compute only v(text).

    Under `jax.set_mesh`, the result is sharded along the batch axis.
    """
    time = timestep(jnp.broadcast_to(sigma, x.shape[:1]))
    if guidance == 1:
        return constrain(transformer(x, time, text), ("batch",))
    # The two rows of each video are adjacent, so that both are on the same device.
    both = transformer(jnp.repeat(x, 2, axis=0), jnp.repeat(time, 2), rearrange([text, negative], PAIRS))
    with_text, without = rearrange(both, "(b two) f h w c -> two b f h w c", two=2)
    return constrain(without + guidance * (with_text - without), ("batch",))


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
    """Sample latents of videos, guided towards `text` and away from `negative`, with Euler steps.

    `on_step` is called once the velocity of a step has been computed. An exception that it raises stops the sampling.
    """

    def velocity(x: Latents, sigma: np.float32) -> Latents:
        result = guided_velocity(transformer, x, sigma, text, negative, guidance=guidance)
        if on_step:
            result.block_until_ready()
            on_step()
        return result

    return euler(velocity, noise.astype(jnp.float32), noise_levels(steps, shift))


# --- The run ---------------------------------------------------------------------------------------------------------


def sample(run: SampleRun) -> None:
    """Make the missing videos and the contact sheet in run.sampling.output. Save each video as soon as it is decoded.

    A video depends only on the inputs and its number, so that an interrupted and continued run writes the same files as
    an uninterrupted one. All inputs are checked before the first step.

    The text encoder is freed before the transformer is loaded. The autoencoder (0.5 GB) stays in memory alongside the
    transformer.

    Raises:
        InputError: a file is missing, is damaged or does not fit the model; the mesh cannot be made or cannot split the
            video; the output folder is in use or contains other files; or a video is not finite.
        StoppedEarly: Ctrl-C or SIGTERM stopped the run; the finished videos are kept.
    """
    settings = run.sampling
    mesh = make_mesh(run.mesh)
    check_split(run.model.heads, math.prod(token_grid(run.clip.latent_size)), mesh)
    prompts = read_sampling_prompts(settings.prompts)
    work = f"{len(prompts)} prompts, {settings.steps} steps each, {run.clip.rate:g} frames a second"
    model = f"{run.model.path} ({run.model.layers} blocks of width {run.model.dim}, {run.model.dtype})"
    console.log(f"{work}; {model}; devices: {mesh.size} x {mesh.devices.flat[0].device_kind}")
    choices = [parse_choice(file) for file in settings.loras]
    lora = read_loras(choices) if choices else None
    samples = Samples(
        run=run, prompts=prompts, weights=fingerprint_weights(check_model(run.model)),
        lora=fingerprint_loras(choices),
    )  # fmt: skip
    samples.check()
    if not samples.missing() and samples.contact_sheet.exists():
        print(f"{settings.output}: already contains all {len(prompts)} videos")
        return
    with samples.locked():
        try:
            if missing := samples.missing():
                _make(samples, missing, lora, mesh)
            samples.write_contact_sheet()
        except KeyboardInterrupt:
            done = len(prompts) - len(samples.missing())
            raise StoppedEarly(
                f"stopped: {done} of {len(prompts)} videos are done; to continue, run the same command again"
            ) from None
    print(f"{settings.output}: {len(prompts)} videos and {samples.contact_sheet.name}")


def _make(samples: Samples, missing: set[int], lora: Lora | None, mesh: Mesh) -> None:
    """Sample and decode the missing videos, in rounds of one batch each."""
    run, prompts = samples.run, samples.prompts
    with console.timed("loading the autoencoder"):
        vae = load_vae(run.model.path)
    with console.timed("encoding the prompts"):
        text = embed(run, [*prompts, run.sampling.negative_prompt])
    with console.timed("loading the transformer"):
        transformer = _transformer(run, lora, mesh)
    rounds = make_rounds(len(prompts), num_shards("batch", mesh), missing)
    with interrupts.postponed("stopping after this step"):
        with console.timed("compiling, and testing one step and the autoencoder"):
            first = sample_round(run, transformer, text, rounds[0], mesh, _stop_if_requested, steps=1)
            decode(vae, first[0], rounds[0][0], run)
        samples.begin()
        with tqdm(total=len(rounds) * run.sampling.steps, desc="sampling", unit="step") as bar:

            def on_step() -> None:
                bar.update()
                _stop_if_requested()

            for numbers in rounds:
                latents = sample_round(run, transformer, text, numbers, mesh, on_step)
                _write(samples, missing, vae, dict(zip(sorted(set(numbers)), latents, strict=False)))


def sample_round(
    run: SampleRun, transformer: WanTransformer, text: np.ndarray, numbers: Sequence[int], mesh: Mesh,
    on_step: Callable[[], None], steps: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Sample the latents of one round of prompts. In a run of several processes, all of them call this.

    Args:
        text: the embeddings of all prompts, then that of the negative prompt, from `embed`.
        numbers: the numbers of the prompts: one for each shard of a batch, from `make_rounds`.
        on_step: see `sample_latents`.
        steps: instead of `run.sampling.steps`.
    """
    settings = run.sampling
    shape = (*run.clip.latent_size, transformer.config.channels)
    key = jax.random.key(settings.seed)
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float32) for n in numbers])

    def split(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), rows.__getitem__)

    rows = (split(each) for each in (noise, text[list(numbers)], text[[-1] * len(numbers)]))
    with jax.set_mesh(mesh):  # not for the autoencoder, which runs on one device
        latents = sample_latents(
            transformer, *rows, steps=steps or settings.steps, shift=settings.shift, guidance=settings.guidance,
            on_step=on_step,
        )  # fmt: skip
        if not latents.is_fully_addressable:
            latents = jax.jit(lambda x: x, out_shardings=replicated(mesh))(latents)
    return np.asarray(latents)


def make_rounds(num_prompts: int, size: int, missing: set[int]) -> list[list[int]]:
    """Return the numbers of the prompts in each round that has a missing video.

    A round has as many prompts as the batch has shards. The last round is filled up with copies of its last prompt, so
    that all rounds run the same program. The prompts of a round are always the same, no matter which videos are
    missing.
    """
    last = num_prompts - 1
    rounds = [[min(first + n, last) for n in range(size)] for first in range(0, num_prompts, size)]
    return [numbers for numbers in rounds if not missing.isdisjoint(numbers)]


def _write(samples: Samples, missing: set[int], vae: WanVae, latents: dict[int, np.ndarray]) -> None:
    """Decode the latents of a round (prompt number -> latents) and write the missing videos.

    Raises:
        InputError: a video is not finite or has an unexpected size; the others have been written.
    """
    first_error = None
    for number in sorted(missing & latents.keys()):
        try:
            pixels = decode(vae, latents[number], number, samples.run)
        except InputError as error:
            first_error = first_error or error
        else:
            video.write_clip(samples.video(number), video.to_uint8(pixels), samples.run.clip.rate)
    if first_error:
        raise first_error


def decode(vae: WanVae, latents: np.ndarray, number: int, run: SampleRun) -> np.ndarray:
    """Decode the latents of one video into pixels `[t, y, x, 3]` in -1..1.

    Raises:
        InputError: latents or pixels are not finite, or the size of the video differs from the configuration.
    """
    if not np.isfinite(latents).all():
        guidance = f"sampling.guidance={run.sampling.guidance:g} may be too high"
        values = "the weights or the LoRA may contain extreme values"
        raise InputError(f"prompt {number}: the latents are not finite; {guidance}, or {values}")
    pixels = np.asarray(vae.decode(jnp.asarray(latents[None])))[0]
    if not np.isfinite(pixels).all():
        raise InputError(f"prompt {number}: the autoencoder of {run.model.path} produced pixels that are not finite")
    size = (run.clip.frames, run.clip.height, run.clip.width, 3)
    if pixels.shape != size:
        shape = f"videos of shape {list(pixels.shape)}"
        raise InputError(f"{run.model.path}: the autoencoder produces {shape}; expected {list(size)}")
    return pixels


# --- Input -----------------------------------------------------------------------------------------------------------


def check_model(model: configs.ModelConfig) -> list[Path]:
    """Check, without reading tensors, that the tokenizer and the three networks are complete and fit together.

    Returns:
        The files of the model.

    Raises:
        InputError: the tokenizer is missing or damaged; a tensor is missing, unexpected or of the wrong shape; or a
            size differs from the configuration or from that of another network.
    """
    load_tokenizer(model.path)
    paths = [Path(find_tokenizer(model.path) or "", "tokenizer.json")]
    sources = [find_base(model), *(find_source(model.path, component) for component in (VAE, TEXT_ENCODER))]
    for source in sources:
        check_source(source, abstract_parameters(source.component, source.config, model.dtype))
        paths += sorted({source.file, *(tensor.file for tensor in source.tensors.values())})
    transformer, vae, encoder = (source.config for source in sources)
    if vae.z_dim != transformer.channels:
        channels = f"the autoencoder has {vae.z_dim} latent channels, but the transformer takes {transformer.channels}"
        raise InputError(f"{model.path}: {channels}")
    if encoder.dim != transformer.text_dim:
        width = f"the text encoder has width {encoder.dim}, but the transformer takes {transformer.text_dim}"
        raise InputError(f"{model.path}: {width}")
    return paths


def read_sampling_prompts(file: Path) -> list[str]:
    try:
        return read_prompts(file)
    except InputError as error:
        raise InputError(f"sampling.prompts={error}") from None


def embed(run: SampleRun, prompts: Sequence[str]) -> np.ndarray:
    """Encode the prompts into an array `[n, 512, d]` in host memory.

    Raises:
        InputError: the text encoder is damaged, or an embedding is not finite.
    """
    tokenizer = load_tokenizer(run.model.path)
    encoder = load_text_encoder(run.model.path, run.model.dtype)
    embeddings = []
    for prompt in prompts:
        embeddings += encode_prompts(tokenizer, encoder, [prompt])
        if not np.isfinite(embeddings[-1].astype(np.float32)).all():
            raise InputError(f"{run.model.path}: the text encoder's embedding of {prompt[:60]!r} is not finite")
    return pad_text(embeddings)


def _transformer(run: SampleRun, lora: Lora | None, mesh: Mesh) -> WanTransformer:
    if not lora:
        return load_base(run.model, mesh)
    check_fits(lora, find_base(run.model).config, f"sampling.lora={shown(run.sampling.lora)}")
    transformer = load_base(run.model, mesh, weight_change(lora._replace(adapters={})))
    load_adapters(transformer, lora, mesh)
    return transformer


def _stop_if_requested() -> None:
    if interrupts.requested():
        raise KeyboardInterrupt
