"""Preparing clips beside a plain loop, and opening and reading prepared clips beside the usual ways in PyTorch."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
import torch
from array_record.python.array_record_data_source import ArrayRecordDataSource

from benchmarks.sizes import WAN_14B, Sizes
from benchmarks.timing import Program, Row, race
from tfm_jax import video
from tfm_jax.arrays import DTYPES, Dtype
from tfm_jax.config import ClipConfig, LoraConfig, load
from tfm_jax.data import format as layout
from tfm_jax.data.batches import Batches
from tfm_jax.data.decoding import Pixels, read_clips
from tfm_jax.data.encoding import Encoders, Unencoded, encode
from tfm_jax.data.format import Manifest, Record
from tfm_jax.data.metadata import Clip
from tfm_jax.data.prepare import PrepareRun, read_list
from tfm_jax.data.records import open_records
from tfm_jax.data.survey import survey
from tfm_jax.flops import training_flops
from tfm_jax.moving_shapes import world
from tfm_jax.planning.chips import CHIPS
from tfm_jax.sharding import one_device_mesh
from tfm_jax.wan import load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.tokenizer import encode_prompts
from tfm_jax.wan.transformer import token_grid

SUBJECT = "data"
CLIPS = 16
"""Number of clips that are prepared at a time."""
MANY = 40_000
"""Number of records that are opened."""
STORED, BATCH = 48, 4
CLIP_480P, PROMPT_TOKENS = ClipConfig(frames=81, height=480, width=832), 300
HOST, HOST_CHIPS, UTILISATION = "h100", 8, 0.4
"""A machine that trains Wan2.1-14B, and the fraction of its peak that we assume training to reach."""


def measure(sizes: Sizes) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="benchmark.") as scratch:
        yield measure_preparation(Path(scratch), sizes)
        yield measure_opening(Path(scratch, "many"), sizes)
        yield measure_reading(Path(scratch), sizes)


def measure_preparation(scratch: Path, sizes: Sizes) -> Row:
    """Read and encode the same clips as tfm-prepare does, and one by one. Nothing is written."""
    world.write_clips(scratch / "clips", CLIPS)
    paths = {"data.source": str(scratch / "clips"), "data.path": str(scratch / "latents")}
    run = load(PrepareRun, "wan_tiny", paths)
    _, rows = read_list(run)
    ours, plain = _encode_ahead(run, rows), _encode_one_by_one(run, rows)
    return race(
        SUBJECT, f"read and encode {CLIPS} clips with the embedded model", ours, "a plain loop", plain, sizes.budget
    )


def _encode_ahead(run: PrepareRun, rows: Sequence[Clip]) -> Program:
    encoders = Encoders(run.model)

    def program() -> None:
        decoded = read_clips(survey(rows, run.clip, run.data.seed), run.clip)
        clips = (
            Unencoded(found.video, row.prompt, found.pixels)
            for (row, *_), found in decoded
            if isinstance(found, Pixels)
        )
        for record in encode(clips, encoders, run.data.dtype):
            layout.serialise(record)

    return program


def _encode_one_by_one(run: PrepareRun, rows: Sequence[Clip]) -> Program:
    tokenizer, vae = load_tokenizer(run.model.path), load_vae(run.model.path)
    encoder = load_text_encoder(run.model.path, run.model.dtype)

    def program() -> None:
        for row in rows:
            pixels = video.read_clip(row.path, run.clip.frames, run.clip.height, run.clip.width, run.clip.rate)
            encode_prompts(tokenizer, encoder, [row.prompt])
            np.asarray(vae.encode(jnp.asarray(video.from_uint8(pixels))[None]))

    return program


def measure_opening(folder: Path, sizes: Sizes) -> Row:
    """Open a folder of many records, all of which have the same small content."""
    record = Record(np.zeros((1, 2, 2, 16), np.float32), np.zeros((1, 8), np.float32), "prompt", "name.mp4")
    write_records(folder, [record] * 64, "float32", copies=MANY // 64)
    shards = sorted(str(path) for path in folder.glob("*array_record*"))
    theirs = "array_record alone, which checks nothing"
    return race(SUBJECT, f"open {MANY:,} records", lambda: open_records(folder), theirs, _opened(shards), sizes.budget)


def _opened(shards: Sequence[str]) -> Callable[[], int]:
    return lambda: len(ArrayRecordDataSource(shards))


def measure_reading(scratch: Path, sizes: Sizes) -> Row:
    """Read clips of the size of Wan2.1 at 480p, which are in the page cache, once over the whole folder."""
    rng, dtype = np.random.default_rng(0), DTYPES["bfloat16"]
    latents = rng.standard_normal((*CLIP_480P.latent_size, WAN_14B.channels), np.float32).astype(dtype)
    text = rng.standard_normal((PROMPT_TOKENS, WAN_14B.text_dim), np.float32).astype(dtype)
    write_records(scratch / "large", [Record(latents, text, "prompt", "name.mp4")] * (STORED // 3), "bfloat16", 3)
    batches = Batches(open_records(scratch / "large"), BATCH, 0, one_device_mesh(), WAN_14B.text_len)
    read = batches.iterate()

    def ours() -> None:
        for _ in range(STORED // BATCH):
            next(read)

    theirs = _torch_reader(scratch / "torch", latents, text)
    row = race(
        SUBJECT, f"read {STORED} clips of 480p", ours, "a DataLoader of torch.load, 2 workers", theirs, sizes.budget
    )
    size = (latents.nbytes + text.nbytes) / 1e6
    flops = sum(training_flops(WAN_14B, LoraConfig(), "full", 1, math.prod(token_grid(CLIP_480P.latent_size))))
    used = HOST_CHIPS * CHIPS[HOST].peak * UTILISATION / flops
    machine = f"{HOST_CHIPS} {HOST} at {UTILISATION:.0%} of their peak"
    rate = STORED / row.seconds
    return row._replace(note=f"{rate:.0f} clips/s of {size:.1f} MB; training 14B on {machine} uses {used:.2f}")


class _Files(torch.utils.data.Dataset):
    """Clips in files of `torch.save`."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.load(self.paths[index])


def _torch_reader(folder: Path, latents: np.ndarray, text: np.ndarray) -> Program:
    folder.mkdir()
    content = tuple(torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in (latents, text))
    paths = [folder / f"{number}.pt" for number in range(STORED)]
    for path in paths:
        torch.save(content, path)
    loader = torch.utils.data.DataLoader(_Files(paths), BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    return lambda: [None for _ in loader]


def write_records(
    folder: Path,
    records: Sequence[Record],
    dtype: Dtype,
    copies: int,
    clip: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Write a folder as tfm-prepare does, but with copies of one shard. Its manifest names no encoders.

    Args:
        clip: section of the configuration.
    """
    folder.mkdir()
    first, entries = layout.write_shard(folder / layout.shard_name(0, copies), records)
    shards = [first.model_copy(update={"file": layout.shard_name(number, copies)}) for number in range(copies)]
    for shard in shards[1:]:
        shutil.copy(folder / first.file, folder / shard.file)
    latents, text, *_ = records[0]
    layout.write_description(folder, dtype, latents.shape[-1], text.shape[-1], shards)
    layout.write_index(folder, entries * copies)
    layout.write_empty_prompt(folder, text[:1])
    layout.write_manifest(
        folder, Manifest(encoders={}, dtype=dtype, clip=dict(clip), data_seed=0, model="", clips="", shards=shards)
    )
