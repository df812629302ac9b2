"""Encode clips and prompts once, into latents and text embeddings on disk, so that training never runs the encoders."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from tfm_jax import config as configs
from tfm_jax import console, video
from tfm_jax.config import section
from tfm_jax.data.buckets import Bucket
from tfm_jax.data.clips import Rejected, Windows, describe_rate
from tfm_jax.data.metadata import Clip, Metadata, find_metadata, read_metadata
from tfm_jax.data.records import Record, RecordWriter
from tfm_jax.data.survey import Surveyed, check_length, check_sizes, none_usable, survey
from tfm_jax.errors import InputError
from tfm_jax.wan import load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.tokenizer import encode_prompts

T = TypeVar("T")


@section
class PrepareRun:
    """The sections of the configuration that data preparation reads."""

    model: configs.ModelConfig
    clip: configs.ClipConfig
    data: configs.DataConfig


class Prepared(NamedTuple):
    """How many clips were written, and how many of the listed videos were rejected."""

    written: int
    rejected: int


def prepare(run: PrepareRun) -> Prepared:
    """Encode the clips that `run.data.source` lists and write `run.data.path`, completely or not at all.

    A video that cannot be used, such as one that is too short or damaged, is listed with the reason in rejected.jsonl
    in that folder.

    Raises:
        InputError: `run.data.source` is missing, the list of clips or the model is not as expected, the output folder
            is not empty, no clip can be used, the clips have several sizes, or a video is too short and
            `run.clip.short` says to refuse it.
    """
    listed, rows = read_list(run)
    values = configs.plain(run)
    metadata = {"model": values["model"]["path"], **values["clip"]}
    with RecordWriter(run.data.path, metadata) as writer:
        surveyed = survey(rows, run.clip, run.data.seed)
        check_length(surveyed, run.clip)
        bucket = check_sizes(surveyed, run.data.path)
        _announce(run, listed, len(rows), bucket)
        return _write(surveyed, run.clip, _encoder(run.model), writer)


def read_list(run: PrepareRun) -> tuple[Metadata, list[Clip]]:
    """Find and read the list of clips.

    Raises:
        InputError: `run.data.source` is missing, or the list is not as expected.
    """
    if run.data.source is None:
        raise InputError("data.source is missing; expected a list of clips, or a folder that contains metadata.csv")
    listed = find_metadata(run.data.source)
    return listed, read_metadata(listed, run.data.absolute_paths)


def _announce(run: PrepareRun, listed: Metadata, count: int, bucket: Bucket) -> None:
    size = f"{bucket.frames} frames of {bucket.height} x {bucket.width} pixels at {describe_rate(run.clip)}"
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
    surveyed: Sequence[Surveyed],
    clip: configs.ClipConfig,
    encode: Callable[[Clip, np.ndarray], Record],
    writer: RecordWriter,
) -> Prepared:
    rejected: list[str] = []
    repeating: list[str] = []  # clips with two equal frames in a row
    written = 0

    def reject(row: Clip, reason: str) -> None:
        rejected.append(reason)
        writer.reject(row.video, {row.origin.kind: row.origin.value}, reason)
        tqdm.write(f"rejected: {reason}", file=sys.stderr)

    total = sum(len(chosen.starts) for _, _, chosen in surveyed if isinstance(chosen, Windows))
    for row, pixels in _with_progress(_read(surveyed, clip, reject), total):
        if (pixels[1:] == pixels[:-1]).all(axis=(1, 2, 3)).any():
            repeating.append(row.video)
        writer.write(encode(row, pixels))
        written += 1
    if not written:
        raise none_usable(writer.folder, len(surveyed), rejected[0])
    if repeating:
        console.log(
            f"note: {len(repeating)} of {written} clips, such as {repeating[0]}, show the same frame twice in a row: "
            f"nothing moves in them, or their videos have fewer frames per second than clip.fps={clip.fps}"
        )
    return Prepared(written, len(rejected))


def _read(
    surveyed: Sequence[Surveyed], clip: configs.ClipConfig, reject: Callable[[Clip, str], None]
) -> Iterator[tuple[Clip, np.ndarray]]:
    """Yield the training clips and their pixels. Of a video that is damaged, those before the damage are yielded."""
    for row, _, chosen in surveyed:
        if isinstance(chosen, Rejected):
            reject(row, f"{row.path}: {chosen.reason}")
            continue
        clips = video.read_windows(row.path, chosen.starts, *chosen.bucket, clip.fps, clip.resize)
        try:
            for name, pixels in zip(chosen.names(row.video), clips, strict=True):
                yield row._replace(video=name), pixels
        except InputError as error:
            reject(row, str(error))


def _with_progress(clips: Iterator[T], total: int) -> Iterator[T]:
    """Yield the clips, with a progress bar from the second one on, because the first one includes the compilation."""
    console.log("compiling, and encoding the first clip")
    yield from itertools.islice(clips, 1)
    yield from tqdm(clips, desc="preparing", unit="clip", initial=1, total=total)
