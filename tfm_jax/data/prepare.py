"""Encode clips and prompts once, into latents and text embeddings on disk, so that training never runs the encoders."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from tfm_jax import config as configs
from tfm_jax import console, video
from tfm_jax.config import section
from tfm_jax.data.metadata import Clip, Metadata, find_metadata, read_metadata
from tfm_jax.data.records import Record, RecordWriter
from tfm_jax.errors import InputError
from tfm_jax.wan import load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.tokenizer import encode_prompts


@section
class PrepareRun:
    """The sections of the configuration that data preparation reads."""

    model: configs.ModelConfig
    clip: configs.ClipConfig
    data: configs.DataConfig


class Prepared(NamedTuple):
    """How many of the listed clips were written, and how many were rejected."""

    written: int
    rejected: int


def prepare(run: PrepareRun) -> Prepared:
    """Encode the clips that `run.data.source` lists and write `run.data.path`, completely or not at all.

    A clip that cannot be used, such as one that is too short or damaged, is listed with the reason in rejected.jsonl in
    that folder.

    Raises:
        InputError: `run.data.source` is missing, the list of clips or the model is not as expected, the output folder
            is not empty, or no clip can be used.
    """
    if run.data.source is None:
        raise InputError("data.source is missing; expected a list of clips, or a folder that contains metadata.csv")
    listed = find_metadata(run.data.source)
    rows = read_metadata(listed, run.data.absolute_paths)
    values = configs.plain(run)
    metadata = {"model": values["model"]["path"], **values["clip"]}
    with RecordWriter(run.data.path, metadata) as writer:
        _announce(run, listed, len(rows))
        encode = _encoder(run.model)
        return _write(rows, run.clip, encode, writer)


def _announce(run: PrepareRun, listed: Metadata, count: int) -> None:
    clip = run.clip
    size = f"{clip.frames} frames of {clip.height} x {clip.width} pixels at {clip.fps:g} frames a second"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    clips = f"{listed.path} ({listed.format}): {count} clip{'s' if count > 1 else ''}"
    console.log(f"{clips}, {size}; model {run.model.path}; {devices}")


def _encoder(model: configs.ModelConfig) -> Callable[[Clip, np.ndarray], Record]:
    """Load the encoders, and return a function that encodes a clip and its pixels (`[t, y, x, 3]` uint8) into a
    record."""
    console.log("loading the text encoder and the autoencoder")
    tokenizer = load_tokenizer(model.path)
    text_encoder = load_text_encoder(model.path, model.dtype)
    vae = load_vae(model.path)

    def encode(row: Clip, pixels: np.ndarray) -> Record:
        latents = np.asarray(vae.encode(jnp.asarray(video.from_uint8(pixels))[None]))[0]
        [text] = encode_prompts(tokenizer, text_encoder, [row.prompt])
        return Record(latents, text.astype(np.float32), row.prompt, row.video)

    return encode


def _write(
    rows: Sequence[Clip], clip: configs.ClipConfig, encode: Callable[[Clip, np.ndarray], Record], writer: RecordWriter
) -> Prepared:
    rejected: list[str] = []
    repeating: list[str] = []  # clips with two equal frames in a row
    for row in _with_progress(rows):
        try:
            pixels = video.read_clip(row.path, clip.frames, clip.height, clip.width, clip.fps)
        except InputError as error:
            rejected.append(str(error))
            writer.reject(row.video, {row.origin.kind: row.origin.value}, str(error))
            tqdm.write(f"rejected: {error}", file=sys.stderr)
            continue
        if (pixels[1:] == pixels[:-1]).all(axis=(1, 2, 3)).any():
            repeating.append(row.video)
        writer.write(encode(row, pixels))
    if len(rejected) == len(rows):
        reason = f"the first problem: {rejected[0]}"
        raise InputError(f"{writer.folder}: none of the {len(rows)} clips can be used; {reason}")
    if repeating:
        console.log(
            f"note: {len(repeating)} of {len(rows)} clips, such as {repeating[0]}, show the same frame twice in a row: "
            f"nothing moves in them, or they have fewer than clip.fps={clip.fps:g} frames a second"
        )
    return Prepared(len(rows) - len(rejected), len(rejected))


def _with_progress(rows: Sequence[Clip]) -> Iterator[Clip]:
    """Yield the rows, with a progress bar from the second one on, because the first one includes the compilation."""
    console.log("compiling, and encoding the first clip")
    yield rows[0]
    yield from tqdm(rows[1:], desc="preparing", unit="clip", initial=1, total=len(rows))
