"""The unfinished folder of prepared clips, which fills up block by block, so that a stopped run can be continued.

A block is a run of successive rows of the list of clips, and becomes one shard. What it contains depends on the plan
only: not on the number of processes and devices, and not on when or how often the run was stopped.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tfm_jax import config as configs
from tfm_jax.arrays import DTYPES, TEXT_LENGTH, Dtype
from tfm_jax.config.reading import shown
from tfm_jax.data import format as files
from tfm_jax.data.buckets import list_buckets
from tfm_jax.data.format import Entry, Line, Manifest, Shard, Strict
from tfm_jax.data.metadata import Clip
from tfm_jax.errors import InputError
from tfm_jax.files import check_new_directory, lock, replacing

LOCK = "lock"
"""The file that is locked by the run that writes to the folder."""
PLAN = "plan.json"
MARKERS = "block-*.json"

SHARD_BYTES = 2**30
"""Size of a shard, at most, if every video gives one clip."""

MAX_ROWS = 64
"""Number of rows of a block, at most. Each process of a run that is killed loses up to one block."""


class Plan(Strict):
    """Everything on which the content of the blocks depends."""

    manifest: Manifest
    """Without shards."""
    model_dtype: Dtype
    """Data type in which the text encoder computes."""
    rows: int
    """Number of rows of the list of clips."""
    rows_per_block: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.rows_per_block)

    def rows_of(self, block: int) -> range:
        start = block * self.rows_per_block
        return range(start, min(self.rows, start + self.rows_per_block))

    def shard_name(self, block: int) -> str:
        return files.shard_name(block, self.blocks)


class Block(Strict):
    """The marker of a finished block: its shard, the records in it, and the clips that are not."""

    shard: Shard
    entries: list[Entry]
    rejected: list[Line]
    repeating: list[str]
    """Clips that show the same frame twice in a row."""


def hash_list(rows: Sequence[Clip]) -> str:
    """Return the fingerprint of a list of clips. Where the files are does not matter."""
    lines = "".join(json.dumps([row.video, row.prompt]) + "\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def count_rows_per_block(clip: configs.ClipConfig, dtype: Dtype, channels: int, text_dim: int) -> int:
    """Return how many rows make up a block, so that a shard is not too large."""
    latents = max(math.prod(bucket.latent_size) for bucket in list_buckets(clip)) * channels
    record = (latents + TEXT_LENGTH * text_dim) * DTYPES[dtype].itemsize
    return max(1, min(MAX_ROWS, SHARD_BYTES // record))


class Unfinished:
    """The folder `output.partial`, in which the files of `output` are made."""

    def __init__(self, output: Path):
        self.output = output
        self._target = Path(os.path.realpath(output))  # resolves links, because a folder cannot be renamed onto one
        self.folder = self._target.parent / f"{self._target.name}.partial"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder, which is created if necessary.

        Raises:
            InputError: `output` is not empty or cannot be created, another run is writing to it, or something else
                made the folder.
        """
        check_new_directory("data.path", self.output)
        if os.path.ismount(self._target):
            advice = f"use a folder inside it, such as {self.output}/latents"
            raise InputError(f"data.path={self.output}: is a mount point; {advice}")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / LOCK).exists():
            raise InputError(f"{self.folder}: was not made by this version of tfm-prepare; remove or rename it")
        with lock(self.folder / LOCK) as held:
            if not held:
                raise InputError(f"{self.output}: is in use by another run; wait for that run to finish")
            yield

    def begin(self, plan: Plan) -> None:
        """Write the plan or, if blocks are finished already, check that their plan was the same.

        Raises:
            InputError: it was another plan.
        """
        if self.is_complete or self._markers():
            self.check(plan)
            for scratch in self.folder.glob(".*.partial"):  # a killed process left it
                scratch.unlink()
            return
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()
        self._write(PLAN, plan)

    def check(self, plan: Plan) -> None:
        """Check that the folder was begun with this plan.

        Raises:
            InputError: it was another plan, or the file is missing or damaged.
        """
        begun = files.read_model(Plan, self.folder / PLAN, f"remove {self.folder}")
        if difference := _difference(begun, plan):
            remedy = f"use the old settings to continue, or remove {self.folder}"
            raise InputError(f"{self.folder}: was begun with {difference}; {remedy}")

    def read_blocks(self) -> dict[int, Block]:
        """Read the finished blocks, by number.

        Raises:
            InputError: a file of a block is missing or damaged.
        """
        blocks = {}
        for marker in self._markers():
            block = files.read_model(Block, marker, "remove it to continue without this block")
            shard = self.folder / block.shard.file
            if not shard.is_file() or shard.stat().st_size != block.shard.bytes:
                raise InputError(f"{shard}: is missing or damaged; remove {marker} to continue without this block")
            blocks[int(marker.stem.removeprefix("block-"))] = block
        return blocks

    def write_block(self, number: int, block: Block) -> None:
        """Mark a block as finished. Its shard must be complete."""
        self._write(f"block-{number:05}.json", block)

    @property
    def is_complete(self) -> bool:
        """Whether all files have been written, so that only renaming is left."""
        return (self.folder / files.MANIFEST).exists()

    def finish(self, plan: Plan) -> None:
        """Write the files that describe all blocks, and rename the folder. Every step can be repeated after a kill."""
        if not self.is_complete:
            self._describe(plan, list(self.read_blocks().values()))
        for marker in self._markers():
            marker.unlink()
        self.folder.rename(self._target)
        for name in (PLAN, LOCK):
            (self._target / name).unlink()

    def _describe(self, plan: Plan, blocks: Sequence[Block]) -> None:
        entries = [entry for block in blocks for entry in block.entries]
        shards = [block.shard for block in blocks]
        rejected = [json.dumps(line, ensure_ascii=False) + "\n" for block in blocks for line in block.rejected]
        text_dim = load_file(self.folder / files.EMPTY_PROMPT)["text"].shape[1]
        files.write_index(self.folder, entries)
        files.write_description(self.folder, plan.manifest.dtype, entries[0].latents[-1], text_dim, shards)
        if rejected:
            with replacing(self.folder / files.REJECTED) as scratch:
                scratch.write_text("".join(rejected), encoding="utf-8")
        files.write_manifest(self.folder, plan.manifest.model_copy(update={"shards": shards}))  # last: is_complete

    @contextlib.contextmanager
    def removed_if_empty(self) -> Iterator[None]:
        """If the block raises an exception, remove the folder, unless it contains records."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(InputError):  # a file is damaged: others may be good
                if not self.is_complete and not any(block.entries for block in self.read_blocks().values()):
                    shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _markers(self) -> list[Path]:
        return sorted(self.folder.glob(MARKERS))

    def _write(self, name: str, content: Strict) -> None:
        with replacing(self.folder / name) as scratch:
            scratch.write_text(content.model_dump_json() + "\n", encoding="utf-8")


def _difference(old: Plan, new: Plan) -> str | None:
    """Return the first difference between two plans, in the words of the configuration; None if there is none."""
    before, now = _settings(old), _settings(new)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return f"{name}={shown(before.get(name))}, not {shown(now.get(name))}"
    return None


def _settings(plan: Plan) -> dict[str, Any]:
    manifest = plan.manifest
    return {
        **{f"clip.{name}": value for name, value in manifest.clip.items()},
        "data.dtype": manifest.dtype,
        "data.seed": manifest.data_seed,
        "data.source": f"a list of {plan.rows} clips with the fingerprint {manifest.clips}",
        "model.dtype": plan.model_dtype,
        **{f"model.path: {name}": f"the weights {value}" for name, value in manifest.encoders.items()},
        "rows per block": plan.rows_per_block,
    }
