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
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from tfm_jax import config as configs
from tfm_jax import console, interrupts, video
from tfm_jax.arrays import Latents, Scalar, Text, pad_text
from tfm_jax.config import Solver
from tfm_jax.config.reading import shown
from tfm_jax.errors import InputError, StoppedEarly
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.applying import check_fits, weight_change
from tfm_jax.lora.combining import parse_choice, read_loras
from tfm_jax.lora.files import Lora
from tfm_jax.objective import timestep
from tfm_jax.prompts import read_prompts
from tfm_jax.sampling.latents import draw_noise, read_latents
from tfm_jax.sampling.outputs import SampleRun, Samples, fingerprint_latents, fingerprint_loras, fingerprint_weights
from tfm_jax.sampling.solvers import State, Steps, begin, make_steps, take_step
from tfm_jax.sharding import batch_sharding, check_split, constrain, make_mesh, num_shards
from tfm_jax.wan import find_base, load_base, load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.checks import check_source
from tfm_jax.wan.components import TEXT_ENCODER, VAE, abstract_parameters
from tfm_jax.wan.sources import find_source
from tfm_jax.wan.tokenizer import encode_prompts, find_tokenizer
from tfm_jax.wan.transformer import WanTransformer, token_grid
from tfm_jax.wan.vae import WanVae

Noise = Float[np.ndarray, "b f h w c"]

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


@partial(jax.jit, static_argnames=("guidance", "interval"))
def _solve(
    transformer: WanTransformer,
    state: State,
    text: Text,
    negative: Text,
    steps: Steps,
    end: Int[Array, ""],
    *,
    guidance: float,
    interval: tuple[float, float],
) -> State:
    """Take the steps before number `end`. The program is the same for every `end`."""
    first, last = (round(edge * len(steps.sigma)) for edge in interval)

    def velocity(x: Latents, sigma: Scalar, number: Int[Array, ""]) -> Latents:
        def guided(scale: float) -> Latents:
            return guided_velocity(transformer, x, sigma, text, negative, guidance=scale)

        if guidance == 1 or interval == (0, 1):
            return guided(guidance)
        inside = (first <= number) & (number < last)
        return jax.lax.cond(inside, lambda: guided(guidance), lambda: guided(1.0))

    return jax.lax.while_loop(lambda state: state.number < end, lambda state: take_step(velocity, steps, state), state)


def sample_latents(
    transformer: WanTransformer,
    noise: Latents,
    text: Text,
    negative: Text,
    *,
    solver: Solver = "euler",
    steps: int = 50,
    shift: float = 5.0,
    guidance: float = 5.0,
    guidance_interval: tuple[float, ...] = (0.0, 1.0),
    until: int | None = None,
    on_step: Callable[[], None] | None = None,
) -> Latents:
    """Sample latents of videos, guided towards `text` and away from `negative`.

    All steps are one compiled program. With `on_step`, it runs for one step at a time.

    Args:
        guidance_interval: the part of the steps that is guided, as two fractions.
        until: stop after this number of steps; None takes all.
        on_step: called after each step. An exception that it raises stops the sampling.
    """
    table = make_steps(solver, steps, shift)
    state = begin(noise.astype(jnp.float32))
    end = steps if until is None else until
    for number in range(1, end + 1) if on_step else [end]:
        state = _solve(
            transformer, state, text, negative, table, np.int32(number), guidance=guidance, interval=guidance_interval
        )
        if on_step:
            state.x.block_until_ready()
            on_step()
    return state.x


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
    prompts = [settings.prompt] if settings.prompt else _read_prompts(settings.prompts)
    each = f" x {settings.videos_per_prompt} videos" if settings.videos_per_prompt > 1 else ""
    work = f"{len(prompts)} prompts{each}, {settings.steps} steps each, {run.clip.rate:g} frames a second"
    model = f"{run.model.path} ({run.model.layers} blocks of width {run.model.dim}, {run.model.dtype})"
    console.log(f"{work}; {model}; devices: {mesh.size} x {mesh.devices.flat[0].device_kind}")
    choices = [parse_choice(file) for file in settings.loras]
    lora = read_loras(choices) if choices else None
    samples = Samples(
        run=run, prompts=prompts, weights=fingerprint_weights(check_model(run.model)),
        lora=fingerprint_loras(choices), latents=fingerprint_latents(settings.latents),
    )  # fmt: skip
    given = _read_given(samples)
    samples.check()
    if not samples.missing() and samples.contact_sheet.exists():
        print(f"{settings.output}: already contains all {samples.count} videos")
        return
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


def _make(samples: Samples, missing: set[int], lora: Lora | None, given: Noise | None, mesh: Mesh) -> None:
    """Sample and decode the missing videos, in rounds of one batch each."""
    run, settings = samples.run, samples.run.sampling
    with console.timed("loading the autoencoder"):
        vae = load_vae(run.model.path)
    with console.timed("encoding the prompts"):
        text = _embed(run, [*samples.prompts, settings.negative_prompt])
    with console.timed("loading the transformer"):
        transformer = _transformer(run, lora, mesh)
    rounds = _rounds(samples.count, num_shards("batch", mesh), missing)
    size = (*run.clip.latent_size, transformer.config.channels)

    def sample_round(numbers: list[int], on_step: Callable[[], None], until: int | None = None) -> np.ndarray:
        """Sample the latents of the videos with these numbers."""
        noise = jnp.stack([
            draw_noise(settings, *samples.place(n), size) if given is None else given[n % len(given)] for n in numbers
        ])  # fmt: skip
        prompts = [samples.place(n)[0] for n in numbers]
        rows = jax.device_put((noise, text[prompts], text[[-1] * len(numbers)]), batch_sharding(mesh))
        with jax.set_mesh(mesh):  # not for the autoencoder, which runs on one device
            return np.asarray(sample_latents(
                transformer, *rows, solver=settings.solver, steps=settings.steps, shift=settings.shift,
                guidance=settings.guidance, guidance_interval=settings.guidance_interval, until=until, on_step=on_step,
            ))  # fmt: skip

    with interrupts.postponed("stopping after this step"):
        with console.timed("compiling, and testing one step and the autoencoder"):
            latents = sample_round(rounds[0], _stop_if_requested, until=1)
            _decode(vae, latents[0], rounds[0][0], run)
        samples.begin()
        with tqdm(total=len(rounds) * settings.steps, desc="sampling", unit="step") as bar:

            def on_step() -> None:
                bar.update()
                _stop_if_requested()

            for numbers in rounds:
                latents = sample_round(numbers, on_step)
                _write(samples, missing, vae, dict(zip(sorted(set(numbers)), latents, strict=False)))


def _rounds(count: int, size: int, missing: set[int]) -> list[list[int]]:
    """Return the numbers of the videos in each round that has a missing video.

    A round has as many videos as the batch has shards. The last round is filled up with copies of its last video, so
    that all rounds run the same program. The videos of a round are always the same, no matter which are missing.
    """
    last = count - 1
    rounds = [[min(first + n, last) for n in range(size)] for first in range(0, count, size)]
    return [numbers for numbers in rounds if not missing.isdisjoint(numbers)]


def _write(samples: Samples, missing: set[int], vae: WanVae, latents: dict[int, np.ndarray]) -> None:
    """Decode the latents of a round (number -> latents) and write the missing videos.

    Raises:
        InputError: a video is not finite or has an unexpected size; the others have been written.
    """
    first_error = None
    for number in sorted(missing & latents.keys()):
        try:
            pixels = _decode(vae, latents[number], number, samples.run)
        except InputError as error:
            first_error = first_error or error
        else:
            video.write_clip(samples.video(number), video.to_uint8(pixels), samples.run.clip.rate)
    if first_error:
        raise first_error


def _decode(vae: WanVae, latents: np.ndarray, number: int, run: SampleRun) -> np.ndarray:
    """Decode the latents of one video into pixels `[t, y, x, 3]` in -1..1.

    Raises:
        InputError: latents or pixels are not finite, or the size of the video differs from the configuration.
    """
    if not np.isfinite(latents).all():
        guidance = f"sampling.guidance={run.sampling.guidance:g} may be too high"
        values = "the weights or the LoRA may contain extreme values"
        raise InputError(f"video {number}: the latents are not finite; {guidance}, or {values}")
    pixels = np.asarray(vae.decode(jnp.asarray(latents[None])))[0]
    if not np.isfinite(pixels).all():
        raise InputError(f"video {number}: the autoencoder of {run.model.path} produced pixels that are not finite")
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


def _read_prompts(file: Path) -> list[str]:
    try:
        return read_prompts(file)
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


def _embed(run: SampleRun, prompts: Sequence[str]) -> np.ndarray:
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
    try:
        check_fits(lora, find_base(run.model).config)
    except InputError as error:
        raise InputError(f"sampling.lora={shown(run.sampling.lora)}: {error}") from None
    transformer = load_base(run.model, mesh, weight_change(lora._replace(adapters={})))
    load_adapters(transformer, lora, mesh)
    return transformer


def _stop_if_requested() -> None:
    if interrupts.requested():
        raise KeyboardInterrupt
