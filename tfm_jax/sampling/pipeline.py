"""A sampling run: from a prompt file to 000.mp4, 001.mp4, ... and a contact sheet."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from tqdm import tqdm

from tfm_jax import config as configs
from tfm_jax import console, interrupts, video
from tfm_jax.arrays import pad_text
from tfm_jax.config.reading import shown
from tfm_jax.errors import InputError, StoppedEarly
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.applying import check_fits, weight_change
from tfm_jax.lora.combining import Choice, parse_choice, read_loras
from tfm_jax.lora.files import Lora
from tfm_jax.prompts import read_prompts
from tfm_jax.sampling.decoding import check_latents, check_size, decode
from tfm_jax.sampling.latents import draw_noise, read_latents, write_latents
from tfm_jax.sampling.loop import sample_latents
from tfm_jax.sampling.outputs import (
    SampleRun,
    Samples,
    fingerprint_latents,
    fingerprint_loras,
    fingerprint_weights,
)
from tfm_jax.sharding import batch_sharding, check_split, make_mesh, num_shards, replicated
from tfm_jax.wan import find_base, load_base, load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.checks import check_source
from tfm_jax.wan.components import TEXT_ENCODER, VAE, abstract_parameters
from tfm_jax.wan.sources import find_source
from tfm_jax.wan.tokenizer import encode_prompts, find_tokenizer
from tfm_jax.wan.transformer import WanTransformer, token_grid
from tfm_jax.wan.vae import WanVae

Noise = Float[np.ndarray, "b f h w c"]


# --- The run ---------------------------------------------------------------------------------------------------------


def sample(run: SampleRun) -> Samples:
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
    prompts = read_sampling_prompts(settings)
    each = f" x {settings.videos_per_prompt} videos" if settings.videos_per_prompt > 1 else ""
    work = f"{len(prompts)} prompts{each}, {settings.steps} steps each, {run.clip.rate:g} frames a second"
    model = f"{run.model.path} ({run.model.layers} blocks of width {run.model.dim}, {run.model.dtype})"
    console.log(f"{work}; {model}; devices: {mesh.size} x {mesh.devices.flat[0].device_kind}")
    lora = read_lora(run)
    samples = Samples(
        run=run, prompts=prompts, weights=fingerprint_weights(check_model(run.model)),
        lora=fingerprint_loras(_lora_choices(run)), noise=fingerprint_latents(settings.latents),
    )  # fmt: skip
    given = _read_given(samples)
    samples.check()
    if not samples.missing() and samples.contact_sheet.exists():
        print(f"{settings.output}: already contains all {samples.count} videos")
        return samples
    with samples.locked():
        try:
            if missing := samples.missing():
                _make(samples, missing, lora, given, mesh)
            samples.write_contact_sheet()
        except KeyboardInterrupt:
            done = samples.count - len(samples.missing())
            raise StoppedEarly(
                f"stopped: {done} of {samples.count} videos are done; to continue, run the same command again"
            ) from None
    print(f"{settings.output}: {samples.count} videos and {samples.contact_sheet.name}")
    return samples


def _make(samples: Samples, missing: set[int], lora: Lora | None, given: Noise | None, mesh: Mesh) -> None:
    """Make the missing videos. Those whose latents were saved are only decoded."""
    with console.timed("loading the autoencoder"):
        vae = load_vae(samples.run.model.path)
    check_size(vae, samples.run)
    sampled = {number for number in missing if samples.latents_file(number).exists()}
    for number in sorted(sampled):
        _write_video(samples, vae, number)
    if missing - sampled:
        _sample_missing(samples, missing - sampled, lora, given, vae, mesh)


def _sample_missing(
    samples: Samples, missing: set[int], lora: Lora | None, given: Noise | None, vae: WanVae, mesh: Mesh
) -> None:
    """Sample and decode videos, in rounds of one batch each."""
    run = samples.run
    with console.timed("encoding the prompts"):
        text = embed(run, [*samples.prompts, run.sampling.negative_prompt])
    with console.timed("loading the transformer"):
        transformer = _transformer(run, lora, mesh)
    rounds = make_rounds(samples.count, num_shards("batch", mesh), missing)
    with interrupts.postponed("stopping after this step"):
        with console.timed("compiling, and testing one step and the autoencoder"):
            first = sample_round(run, transformer, text, rounds[0], mesh, _stop_if_requested, given, until=1)
            for _ in decode(vae, first[0], rounds[0][0], run):
                pass
        samples.begin()
        with tqdm(total=len(rounds) * run.sampling.steps, desc="sampling", unit="step") as bar:

            def on_step() -> None:
                bar.update()
                _stop_if_requested()

            for numbers in rounds:
                sampled = sample_round(run, transformer, text, numbers, mesh, on_step, given)
                latents = dict(zip(numbers, sampled, strict=True))
                _write_round(samples, vae, {number: latents[number] for number in missing & latents.keys()})


def sample_round(
    run: SampleRun, transformer: WanTransformer, text: np.ndarray, numbers: Sequence[int], mesh: Mesh,
    on_step: Callable[[], None], given: Noise | None = None, until: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Sample the latents of one round of videos. In a run of several processes, all of them call this.

    Args:
        text: the embeddings of all prompts, then that of the negative prompt, from `embed`.
        numbers: the numbers of the videos: one for each shard of a batch, from `make_rounds`.
        on_step: see `sample_latents`.
        given: the initial noise of one video or of all; None draws it.
        until: stop after this number of steps.
    """
    settings = run.sampling
    size = (*run.clip.latent_size, transformer.config.channels)
    places = [settings.place(number) for number in numbers]
    noise = np.stack([
        draw_noise(settings, *place, size) if given is None else given[number % len(given)]
        for number, place in zip(numbers, places, strict=True)
    ])  # fmt: skip

    def split(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), rows.__getitem__)

    rows = (split(each) for each in (noise, text[[prompt for prompt, _ in places]], text[[-1] * len(numbers)]))
    with jax.set_mesh(mesh):  # not for the autoencoder, which runs on one device
        latents = sample_latents(
            transformer, *rows, solver=settings.solver, steps=settings.steps, shift=settings.shift,
            guidance=settings.guidance, guidance_interval=settings.guidance_interval, until=until, on_step=on_step,
        )  # fmt: skip
        if not latents.is_fully_addressable:
            latents = jax.jit(lambda x: x, out_shardings=replicated(mesh))(latents)
    return np.asarray(latents)


def make_rounds(count: int, size: int, missing: set[int]) -> list[list[int]]:
    """Return the numbers of the videos in each round that has a missing video.

    A round has as many videos as the batch has shards. The last round is filled up with copies of its last video, so
    that all rounds run the same program. The videos of a round are always the same, no matter which are missing.
    """
    last = count - 1
    rounds = [[min(first + n, last) for n in range(size)] for first in range(0, count, size)]
    return [numbers for numbers in rounds if not missing.isdisjoint(numbers)]


def _write_round(samples: Samples, vae: WanVae, latents: dict[int, np.ndarray]) -> None:
    """Save the latents of a round (number -> latents), then decode them and write the videos.

    Raises:
        InputError: latents or a video are not finite; the others have been written.
    """

    def save(number: int) -> None:
        check_latents(latents[number], number, samples.run)
        write_latents(samples.latents_file(number), latents[number][None])

    errors = _attempt(save, latents)
    saved = {number for number in latents if samples.latents_file(number).exists()}
    errors += _attempt(lambda number: _write_video(samples, vae, number), saved)
    if errors:
        raise errors[0]


def _write_video(samples: Samples, vae: WanVae, number: int) -> None:
    """Decode the saved latents of one video and write it."""
    clip = samples.run.clip
    [latents] = read_latents(samples.latents_file(number), (*clip.latent_size, vae.config.z_dim))
    frames = decode(vae, latents, number, samples.run)
    video.write_clip(samples.video(number), frames, clip.rate, samples.about(number))


def _attempt(action: Callable[[int], None], numbers: Iterable[int]) -> list[InputError]:
    """Call `action` for every number, in order, and return the errors."""
    errors = []
    for number in sorted(numbers):
        try:
            action(number)
        except InputError as error:
            errors.append(error)
    return errors


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


def read_sampling_prompts(settings: configs.SamplingConfig) -> list[str]:
    """Return the prompts: the one of `sampling.prompt`, or those of the file."""
    if settings.prompt is not None:
        return [settings.prompt]
    try:
        return read_prompts(settings.prompts)
    except InputError as error:
        raise InputError(f"sampling.prompts={error}") from None


def _read_given(samples: Samples) -> Noise | None:
    """Read the initial noise of `sampling.latents`: of one video, or of all."""
    run, file = samples.run, samples.run.sampling.latents
    if file is None:
        return None
    try:
        given = read_latents(file, (*run.clip.latent_size, find_base(run.model).config.channels))
    except InputError as error:
        raise InputError(f"sampling.latents={error}") from None
    if len(given) not in (1, samples.count):
        expected = f"one, or {samples.count} for all videos"
        raise InputError(f"sampling.latents={file}: contains the noise of {len(given)} videos; expected {expected}")
    return given


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


def read_lora(run: SampleRun) -> Lora | None:
    """Read the LoRA files of `sampling.lora`, and add them up; None without files.

    Raises:
        InputError: a file is missing or damaged, or does not fit the model.
    """
    if not run.sampling.lora:
        return None
    lora = read_loras(_lora_choices(run))
    check_fits(lora, find_base(run.model).config, f"sampling.lora={shown(run.sampling.lora)}")
    return lora


def _lora_choices(run: SampleRun) -> list[Choice]:
    return [parse_choice(file) for file in run.sampling.loras]


def _transformer(run: SampleRun, lora: Lora | None, mesh: Mesh) -> WanTransformer:
    if not lora:
        return load_base(run.model, mesh)
    transformer = load_base(run.model, mesh, weight_change(lora._replace(adapters={})))
    load_adapters(transformer, lora, mesh)
    return transformer


def _stop_if_requested() -> None:
    if interrupts.requested():
        raise KeyboardInterrupt
