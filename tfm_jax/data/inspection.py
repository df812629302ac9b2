"""What tfm-prepare made, for a user who wants to see it: statistics of a folder, and a picture of what it contains."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from tfm_jax import video
from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.config import DataConfig
from tfm_jax.data.format import REJECTED, REMEDY, Entry
from tfm_jax.data.order import is_held_out
from tfm_jax.data.prepare import PrepareRun
from tfm_jax.data.records import Records, check_encoder, open_records
from tfm_jax.data.survey import list_reasons
from tfm_jax.errors import InputError
from tfm_jax.files import replacing
from tfm_jax.wan import load_vae
from tfm_jax.wan.components import VAE
from tfm_jax.wan.vae import WanVae

CONTACT_SHEET = "contact_sheet.png"
"""The picture, in the folder of the latents."""

SHOWN = 8
"""Number of clips in the picture."""


def inspect(run: PrepareRun) -> None:
    """Print statistics of the finished folder `run.data.path`, and draw some of its clips into `CONTACT_SHEET` there.

    Raises:
        InputError: the folder was not written by tfm-prepare or is damaged, or `run.model.path` holds no autoencoder,
            or another one than that which made the latents.
    """
    records = open_records(run.data.path)
    print("\n".join(describe(records, run.data)), flush=True)
    check_encoder(records, run.model.path, VAE)
    numbers = choose(records.index, run.data.seed)
    file = records.folder / CONTACT_SHEET
    with replacing(file) as scratch:
        draw(records, numbers, load_vae(run.model.path)).save(scratch, format="PNG")
    print(f"{file}: {len(numbers)} clips, decoded from their latents")


# --- Statistics ------------------------------------------------------------------------------------------------------


def describe(records: Records, data: DataConfig) -> Iterator[str]:
    """Yield the lines of the statistics."""
    index, manifest = records.index, records.manifest
    size = f"{sum(shard.bytes for shard in manifest.shards):,} bytes in {len(manifest.shards):,} shards"
    yield f"{records.folder}: {len(index):,} clips, {size}, {manifest.dtype}"
    encoders = ", ".join(f"{name} {weights}" for name, weights in manifest.encoders.items())
    yield f"encoders: {encoders}, from {manifest.model}"
    yield f"{'frames x height x width':24}{'latents':>24}{'clips':>10}"
    for shape, count in Counter(entry.latents for entry in index).most_common():
        yield f"{_pixels(shape):24}{' x '.join(map(str, shape)):>24}{count:10,}"
    yield _describe_lengths([entry.tokens for entry in index])
    yield from _describe_rejected(records.folder / REJECTED)
    if data.held_out:
        held_out = sum(is_held_out(entry.video, data.held_out) for entry in index)
        yield f"held out: {held_out:,} of {len(index):,} clips (data.held_out={data.held_out:g})"


def _pixels(latents: Sequence[int]) -> str:
    """Return the frames, height and width of a clip; the strides of the autoencoder are 4, 8 and 8."""
    frames, height, width, _ = latents
    return f"{4 * (frames - 1) + 1} x {8 * height} x {8 * width}"


def _describe_lengths(tokens: list[int]) -> str:
    lengths = f"{min(tokens)} to {max(tokens)} tokens, {np.mean(tokens):.0f} on average"
    full = tokens.count(TEXT_LENGTH)
    return f"prompts: {lengths}; {full:,} have {TEXT_LENGTH}, the most that is kept, and may have been cut"


def _describe_rejected(file: Path) -> Iterator[str]:
    """Yield the number of rejected clips by reason, from a file that exists only if there are any."""
    if not file.exists():
        yield "rejected: none"
        return
    try:
        rejected = [json.loads(line) for line in file.read_bytes().splitlines()]
        reasons = list_reasons(rejected)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: is damaged; {REMEDY}") from None
    yield f"rejected: {len(rejected):,}"
    yield from (f"  {reason}" for reason in reasons)


# --- The picture -----------------------------------------------------------------------------------------------------


def choose(index: Sequence[Entry], seed: int) -> list[int]:
    """Choose the records to show: at random, from each size of latents in turn, the most frequent size first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, entry in enumerate(index):
        groups.setdefault(entry.latents, []).append(number)
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(group) for group in sorted(groups.values(), key=len, reverse=True)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*shuffled))
    return [int(number) for number in itertools.islice((n for n in turns if n is not None), SHOWN)]


def draw(records: Records, numbers: Sequence[int], vae: WanVae) -> Image.Image:
    """Decode records and draw them below each other, with the name of the video and the prompt."""
    shown = [records[number] for number in numbers]
    pixels = (np.asarray(vae.decode(jnp.asarray(record.latents, jnp.float32)[None]))[0] for record in shown)
    return video.contact_sheet(map(video.to_uint8, pixels), [f"{record.video}: {record.prompt}" for record in shown])
