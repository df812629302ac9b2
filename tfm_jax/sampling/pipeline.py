"""A sampling run: from a prompt file to 000.mp4, 001.mp4, ... and a contact sheet."""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from tqdm import tqdm

from tfm_jax import config as configs
from tfm_jax import console, interrupts, processes
from tfm_jax.arrays import pad_text
from tfm_jax.config.reading import shown
from tfm_jax.errors import InputError, StoppedEarly
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.applying import check_fits, weight_change
from tfm_jax.lora.combining import Choice, parse_choice, read_loras
from tfm_jax.lora.files import Lora
from tfm_jax.prompts import read_prompts
from tfm_jax.sampling.latents import draw_noise, read_latents
from tfm_jax.sampling.loop import sample_latents
from tfm_jax.sampling.outputs import (
    SampleRun,
    Samples,
    fingerprint_latents,
    fingerprint_loras,
    fingerprint_weights,
)
from tfm_jax.sampling.writing import VideoWriter
from tfm_jax.sharding import check_split, fetch, make_mesh, num_shards, split_batch
from tfm_jax.wan import find_base, load_base, load_text_encoder, load_tokenizer
from tfm_jax.wan.checks import check_source
from tfm_jax.wan.components import TEXT_ENCODER, VAE, abstract_parameters
from tfm_jax.wan.sources import find_source
from tfm_jax.wan.tokenizer import encode_prompts, find_tokenizer
from tfm_jax.wan.transformer import WanTransformer, token_grid

Noise = Float[np.ndarray, "b f h w c"]


# --- The run ---------------------------------------------------------------------------------------------------------


def sample(run: SampleRun) -> Samples:
    """Make the missing videos and the contact sheet in run.sampling.output. Save each video as soon as it is decoded.

    A video depends only on the inputs and its number, so that an interrupted and continued run writes the same files as
    an uninterrupted one. All inputs are checked before the first step. In a run of several processes
    (`tfm_jax.processes`), all of them call this with the same arguments, on a shared filesystem. The first process
    decides which videos are missing, and each writes its own.

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
    _announce(run, len(prompts), mesh)
    lora = read_lora(run)
    samples = Samples(
        run=run, prompts=prompts, weights=fingerprint_weights(check_model(run.model)),
        lora=fingerprint_loras(_lora_choices(run)), noise=fingerprint_latents(settings.latents),
    )  # fmt: skip
    given = _read_given(samples)
    try:
        with contextlib.ExitStack() as stack:
            work = processes.decided_by_first(f"{settings.output}: work", lambda: _claim(samples, stack))
            if work is None:
                processes.print_once(f"{settings.output}: already contains all {samples.count} videos")
                return samples
            _make(samples, *work, lora, given, mesh)
            if processes.is_first():
                samples.write_contact_sheet()
    except KeyboardInterrupt:
        done = samples.count - len(samples.missing())
        raise StoppedEarly(
            f"stopped: {done} of {samples.count} videos are done; to continue, run the same command again"
        ) from None
    processes.print_once(f"{settings.output}: {samples.count} videos and {samples.contact_sheet.name}")
    return samples


def _announce(run: SampleRun, prompts: int, mesh: Mesh) -> None:
    if not processes.is_first():
        return
    settings = run.sampling
    each = f" x {settings.videos_per_prompt} videos" if settings.videos_per_prompt > 1 else ""
    work = f"{prompts} prompts{each}, {settings.steps} steps each, {run.clip.rate:g} frames a second"
    model = f"{run.model.path} ({run.model.layers} blocks of width {run.model.dim}, {run.model.dtype})"
    where = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    console.log(f"{work}; {model}; devices: {mesh.size} x {mesh.devices.flat[0].device_kind}{where}")


def _claim(samples: Samples, stack: contextlib.ExitStack) -> tuple[list[int], list[int]] | None:
    """Lock the folder until `stack` is closed, and find the missing videos.

    Returns:
        The numbers of the videos whose latents have been saved, and of the others; None if nothing is missing.

    Raises:
        InputError: the folder is in use or contains other files.
    """
    samples.check()
    if not samples.missing() and samples.contact_sheet.exists():
        return None
    stack.enter_context(samples.locked())
    samples.remove_unfinished()
    missing = samples.missing()
    saved = {number for number in missing if samples.latents_file(number).exists()}
    return sorted(saved), sorted(missing - saved)


def _make(
    samples: Samples, saved: list[int], others: list[int], lora: Lora | None, given: Noise | None, mesh: Mesh
) -> None:
    """Make the missing videos. Those whose latents were saved are only decoded."""
    if not saved and not others:
        return
    with _timed("loading the autoencoder"):
        writer = VideoWriter(samples, mesh)
    for numbers in make_rounds(samples.count, num_shards("batch", mesh), set(saved)):
        writer.write(numbers, saved)
    if others:
        _sample_missing(samples, others, lora, given, writer, mesh)


def _sample_missing(
    samples: Samples, missing: list[int], lora: Lora | None, given: Noise | None, writer: VideoWriter, mesh: Mesh
) -> None:
    """Sample and decode videos, in rounds of one batch each."""
    run = samples.run
    with _timed("encoding the prompts"):
        text = embed(run, [*samples.prompts, run.sampling.negative_prompt], mesh)
    with _timed("loading the transformer"):
        transformer = _transformer(run, lora, mesh)
    rounds = make_rounds(samples.count, num_shards("batch", mesh), set(missing))
    with interrupts.postponed("stopping after this step"):
        with _timed("compiling, and testing one step and the autoencoder"):
            first = sample_round(run, transformer, text, rounds[0], mesh, _stop_if_requested, given, until=1)
            writer.rehearse(rounds[0], first)
        if processes.is_first():
            samples.begin()
        hidden = not processes.is_first()
        with tqdm(total=len(rounds) * run.sampling.steps, desc="sampling", unit="step", disable=hidden) as bar:

            def on_step() -> None:
                bar.update()
                _stop_if_requested()

            for numbers in rounds:
                latents = sample_round(run, transformer, text, numbers, mesh, on_step, given)
                writer.write(numbers, missing, latents)


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
    rows = (noise, text[[prompt for prompt, _ in places]], text[[-1] * len(numbers)])
    with jax.set_mesh(mesh):
        latents = sample_latents(
            transformer, *(split_batch(each, mesh) for each in rows), solver=settings.solver, steps=settings.steps,
            shift=settings.shift, guidance=settings.guidance, guidance_interval=settings.guidance_interval,
            until=until, on_step=on_step,
        )  # fmt: skip
    return fetch(latents)


def make_rounds(count: int, size: int, missing: set[int]) -> list[list[int]]:
    """Return the numbers of the videos in each round that has a missing video.

    A round has as many videos as the batch has shards. The last round is filled up with copies of its last video, so
    that all rounds run the same program. The videos of a round are always the same, no matter which are missing.
    """
    last = count - 1
    rounds = [[min(first + n, last) for n in range(size)] for first in range(0, count, size)]
    return [numbers for numbers in rounds if not missing.isdisjoint(numbers)]


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


def embed(run: SampleRun, prompts: Sequence[str], mesh: Mesh) -> np.ndarray:
    """Encode the prompts into an array `[n, l, d]` in host memory, one prompt for each shard of a batch at a time.

    In a run of several processes, all of them call this, and each gets all embeddings.

    Raises:
        InputError: the text encoder is damaged, an embedding is not finite, or the mesh does not divide a parameter.
    """
    tokenizer = load_tokenizer(run.model.path)
    encoder = load_text_encoder(run.model.path, run.model.dtype, mesh)
    text_len = find_base(run.model).config.text_len
    embeddings: dict[int, np.ndarray] = {}
    for numbers in make_rounds(len(prompts), num_shards("batch", mesh), set(range(len(prompts)))):
        encoded = encode_prompts(tokenizer, encoder, [prompts[number] for number in numbers], mesh, text_len)
        embeddings |= zip(numbers, encoded, strict=True)
    for number, embedding in embeddings.items():
        if not np.isfinite(embedding.astype(np.float32)).all():
            raise InputError(
                f"{run.model.path}: the text encoder's embedding of {prompts[number][:60]!r} is not finite"
            )
    return pad_text(list(embeddings.values()), text_len)


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


def _timed(task: str) -> contextlib.AbstractContextManager[None]:
    return console.timed(task) if processes.is_first() else contextlib.nullcontext()


_STEPS = itertools.count(1)
"""Numbers the steps of this process, because the processes of a run agree on the step to stop at."""


def _stop_if_requested() -> None:
    if processes.stop_requested(next(_STEPS)):
        raise KeyboardInterrupt
