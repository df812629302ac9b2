"""The folder of a sampling run: what it is for, which of its videos are there, and who may write to it."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic

from tfm_jax import config as configs
from tfm_jax import files, video
from tfm_jax.config import section
from tfm_jax.errors import InputError

RECORD = "samples.json"
"""What the videos of the folder are made from."""
SHEET = "contact_sheet.png"
LOCK = ".lock"

MAY_CHANGE = {"model.path", "sampling.prompts", "sampling.lora", "sampling.output", "mesh.data", "mesh.fsdp",
              "mesh.sequence", "mesh.tensor"}  # fmt: skip
"""Fields in which a command may differ from the one that began the folder. Files are compared by their content; the
mesh decides how the videos are computed, not what is computed."""

PIECES, PIECE_BYTES = 256, 64 * 1024


@section
class SampleRun:
    """The sections that sampling reads."""

    model: configs.ModelConfig
    clip: configs.ClipConfig
    sampling: configs.SamplingConfig
    mesh: configs.MeshConfig = dataclasses.field(default_factory=configs.MeshConfig)


@section
class Samples:
    """The videos of a sampling run, and the folder that they are in."""

    run: SampleRun
    prompts: list[str]
    weights: str
    """Digest of the model's files, as `digest_weights` makes it."""
    lora: str | None
    """Digest of the LoRA file."""

    @property
    def folder(self) -> Path:
        return self.run.sampling.output

    @property
    def sheet(self) -> Path:
        return self.folder / SHEET

    def video(self, number: int) -> Path:
        """The file of prompt `number`: 000.mp4 and so on, all names of a folder equally long."""
        digits = max(3, len(str(len(self.prompts) - 1)))
        return self.folder / f"{number:0{digits}d}.mp4"

    def missing(self) -> set[int]:
        """Numbers of the prompts that have no video yet."""
        return {number for number in range(len(self.prompts)) if not self.video(number).exists()}

    def check(self) -> None:
        """Check that the folder is new or empty, or was begun by this run.

        Raises:
            InputError: it holds something else, or the videos of another run; the first difference is named.
        """
        files.check_output_directory("sampling.output", self.folder)
        record = self.folder / RECORD
        if record.exists():
            self._compare(_read(record))
        elif self.folder.exists() and any(not _passing(path) for path in self.folder.iterdir()):
            raise InputError(
                f"sampling.output={self.folder}: not empty, and not begun by this program; expected a new or empty "
                "directory"
            )

    def _compare(self, begun: "Samples") -> None:
        """Raise InputError for the first difference from what the folder was begun with."""
        before, now = _fields(begun.run), _fields(self.run)
        for name, value in now.items():
            if name not in MAY_CHANGE and before[name] != value:
                raise self._other_run(name, value, f"were begun with {before[name]}")
        settings = self.run.sampling
        if len(begun.prompts) != len(self.prompts):
            count = f"were begun with {len(begun.prompts)} prompts, not {len(self.prompts)}"
            raise self._other_run("sampling.prompts", settings.prompts, count)
        for number, (old, new) in enumerate(zip(begun.prompts, self.prompts, strict=True)):
            if old != new:
                raise self._other_run("sampling.prompts", settings.prompts, f"have another prompt {number}: {old!r}")
        if begun.lora != self.lora:
            raise self._other_run("sampling.lora", settings.lora or "null", "were begun with another LoRA")
        if begun.weights != self.weights:
            raise self._other_run("model.path", self.run.model.path, "were begun with other weights")

    def _other_run(self, name: str, value: Any, difference: str) -> InputError:
        return InputError(
            f"{name}={value}: the videos in {self.folder} {difference}; expected the same, or another sampling.output"
        )

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it; remove it at the end if it is still empty.

        Raises:
            InputError: another process writes to it.
        """
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        with files.lock(self.folder / LOCK) as mine:
            if not mine:
                raise InputError(f"sampling.output={self.folder}: another process makes its videos; wait for its end")
            try:
                yield
            finally:
                if all(path.name == LOCK for path in self.folder.iterdir()):
                    (self.folder / LOCK).unlink()
                    with contextlib.suppress(OSError):  # another program uses a folder above
                        for path in made:
                            path.rmdir()

    def begin(self) -> None:
        """Write what the videos are made from, and clear away what a killed process left half written."""
        for path in self.folder.glob(".*.partial"):
            path.unlink()
        with files.replacing(self.folder / RECORD) as scratch:
            text = json.dumps(configs.plain(self), indent=1, ensure_ascii=False)
            scratch.write_text(text + "\n", encoding="utf-8")
        with files.replacing(self.folder / "config.yaml") as scratch:
            configs.dump(self.run, scratch)

    def write_sheet(self) -> None:
        """Write the contact sheet from the video files, so that it does not depend on which run made them."""
        clip = self.run.clip
        clips = (
            video.read_clip(self.video(number), clip.frames, clip.height, clip.width, clip.fps)
            for number in range(len(self.prompts))
        )
        with files.replacing(self.sheet) as scratch:
            video.contact_sheet(clips, self.prompts).save(scratch, format="PNG")


def _passing(path: Path) -> bool:
    """Whether a file means nothing by itself: the lock, or what a killed process left half written."""
    return path.name == LOCK or path.suffix == ".partial"


def _read(record: Path) -> Samples:
    """The record of a folder; fields that a newer version of this program added have their defaults."""
    try:
        return pydantic.TypeAdapter(Samples).validate_json(record.read_bytes())
    except pydantic.ValidationError:
        raise InputError(f"{record}: damaged, or of another version; name another sampling.output") from None


def _fields(run: SampleRun) -> dict[str, Any]:
    return {f"{name}.{field}": value for name, part in configs.plain(run).items() for field, value in part.items()}


# --- Digests ---------------------------------------------------------------------------------------------------------


def digest_file(file: Path) -> str:
    """SHA-256 of a file, the first 16 digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def digest_weights(paths: Sequence[Path]) -> str:
    """A name for the content of large files: SHA-256 of each one's size and of pieces spread over it, or all of it.

    16 MiB of every file are read, so that models of many gigabytes take a second. A model that was trained, converted
    or merged anew differs everywhere; a change of single values in a large file may go unnoticed.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as stream:
            for number in range(PIECES):
                start = max(number * PIECE_BYTES, number * (size - PIECE_BYTES) // (PIECES - 1))
                stream.seek(start)
                digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()[:16]
