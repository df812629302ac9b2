"""The output folder of a sampling run: what its videos are made from, which of them exist, and who may write."""

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
from tfm_jax.config.reading import shown
from tfm_jax.errors import InputError
from tfm_jax.lora.combining import Choice

RECORD = "samples.json"
"""Name of the file that records what the videos in the folder are made from: `Samples` as JSON."""
CONTACT_SHEET = "contact_sheet.png"
LOCK = ".lock"

MAY_CHANGE = {"model.path", "sampling.prompts", "sampling.prompt", "sampling.lora", "sampling.latents",
              "sampling.output", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor"}  # fmt: skip
"""Fields that may differ between the run that started the folder and a run that continues it. Files are compared by
content. The mesh changes how the videos are computed, but not the result, beyond rounding."""

NUM_CHUNKS, CHUNK_BYTES = 256, 64 * 1024
"""Number and size of the chunks that `fingerprint_weights` reads from each file."""


@section
class SampleRun:
    """The sections of the configuration that sampling reads."""

    model: configs.ModelConfig
    clip: configs.ClipConfig
    sampling: configs.SamplingConfig
    mesh: configs.MeshConfig = dataclasses.field(default_factory=configs.MeshConfig)


@section
class Samples:
    """The videos of a sampling run and their output folder."""

    run: SampleRun
    prompts: list[str]
    weights: str
    """Fingerprint of the files of the model, from `fingerprint_weights`."""
    lora: str | None
    """Fingerprint of the LoRA files, from `fingerprint_loras`; None without a LoRA."""
    noise: str | None = None
    """Fingerprint of `sampling.latents`; None if the noise is drawn."""

    @property
    def folder(self) -> Path:
        return self.run.sampling.output

    @property
    def contact_sheet(self) -> Path:
        return self.folder / CONTACT_SHEET

    @property
    def count(self) -> int:
        """Number of videos."""
        return len(self.prompts) * self.run.sampling.videos_per_prompt

    def prompt(self, number: int) -> str:
        """Return the prompt of a video."""
        return self.prompts[self.run.sampling.place(number)[0]]

    def video(self, number: int) -> Path:
        """Return the path of a video, such as 000.mp4, or 000_1.mp4 if there are several of each prompt.

        All names have the same length.
        """
        prompt, repeat = self.run.sampling.place(number)
        name = f"{prompt:0{max(3, len(str(len(self.prompts) - 1)))}d}"
        last = self.run.sampling.videos_per_prompt - 1
        return self.folder / (f"{name}_{repeat:0{len(str(last))}d}.mp4" if last else f"{name}.mp4")

    def latents_file(self, number: int) -> Path:
        """Return the path of the latents of a video, such as 000.safetensors."""
        return self.video(number).with_suffix(".safetensors")

    def about(self, number: int) -> dict[str, str]:
        """Return the metadata of a video: its prompt, and as a comment all that determines the video, as JSON."""
        settings = {name: value for name, value in _fields(self.run).items() if name not in MAY_CHANGE}
        place, repeat = self.run.sampling.place(number)
        settings |= {"prompt": self.prompt(number), "prompt_number": place, "weights": self.weights}
        settings |= {"sampling.seed": self.run.sampling.seed + repeat, "lora": self.lora, "noise": self.noise}
        return {"title": self.prompt(number), "comment": json.dumps(settings, ensure_ascii=False)}

    def missing(self) -> set[int]:
        """Return the numbers of the videos that do not exist yet."""
        return {number for number in range(self.count) if not self.video(number).exists()}

    def check(self) -> None:
        """Check that the folder is new or empty, or was started by a run with the same inputs.

        Raises:
            InputError: the folder contains other files, or videos of a different run. In the latter case, the message
                names the first difference.
        """
        files.check_output_directory("sampling.output", self.folder)
        record = self.folder / RECORD
        if record.exists():
            self._compare(_read(record))
        elif self.folder.exists() and any(not _is_temporary(path) for path in self.folder.iterdir()):
            raise InputError(
                f"sampling.output={self.folder}: is not empty and was not created by this program; "
                "expected a new or empty directory"
            )

    def _compare(self, started: "Samples") -> None:
        """Raise InputError for the first difference, if any, from the run that started the folder."""
        before, now = _fields(started.run), _fields(self.run)
        for name, value in now.items():
            if name not in MAY_CHANGE and before[name] != value:
                raise self._other_run(name, value, f"were made with {before[name]}")
        settings = self.run.sampling
        if len(started.prompts) != len(self.prompts):
            count = f"were made with {len(started.prompts)} prompts, not {len(self.prompts)}"
            raise self._other_run("sampling.prompts", settings.prompts, count)
        for number, (old, new) in enumerate(zip(started.prompts, self.prompts, strict=True)):
            if old != new:
                raise self._other_run("sampling.prompts", settings.prompts, f"were made with prompt {number} {old!r}")
        if started.lora != self.lora:
            value = shown(settings.lora or None)
            raise self._other_run("sampling.lora", value, "were made with another LoRA")
        if started.noise != self.noise:
            raise self._other_run("sampling.latents", shown(settings.latents), "were made from other latents")
        if started.weights != self.weights:
            raise self._other_run("model.path", self.run.model.path, "were made with other weights")

    def _other_run(self, name: str, value: Any, difference: str) -> InputError:
        expected = "expected the same, or another sampling.output"
        return InputError(f"{name}={value}: the videos in {self.folder} {difference}; {expected}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and lock it for this process. At the end, remove new folders that are still empty.

        Raises:
            InputError: another process holds the lock.
        """
        created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        with files.lock(self.folder / LOCK) as acquired:
            if not acquired:
                in_use = "another process is writing to it; wait for it to finish"
                raise InputError(f"sampling.output={self.folder}: {in_use}")
            try:
                yield
            finally:
                if all(path.name == LOCK for path in self.folder.iterdir()):
                    (self.folder / LOCK).unlink()
                    with contextlib.suppress(OSError):  # if another program uses a parent folder
                        for path in created:
                            path.rmdir()

    def remove_unfinished(self) -> None:
        """Remove the unfinished files that a killed process left."""
        for path in self.folder.glob(".*.partial"):
            path.unlink()

    def begin(self) -> None:
        """Record what the videos are made from."""
        with files.replacing(self.folder / RECORD) as scratch:
            text = json.dumps(configs.plain(self), indent=1, ensure_ascii=False)
            scratch.write_text(text + "\n", encoding="utf-8")
        with files.replacing(self.folder / "config.yaml") as scratch:
            configs.dump(self.run, scratch)

    def write_contact_sheet(self) -> None:
        """Write the contact sheet. All frames are read from the videos, so interruptions do not change the sheet."""
        clip = self.run.clip
        clips = (
            video.read_clip(self.video(number), clip.frames, clip.height, clip.width, clip.rate)
            for number in range(self.count)
        )
        labels = [self.prompt(number) for number in range(self.count)]
        with files.replacing(self.contact_sheet) as scratch:
            video.contact_sheet(clips, labels).save(scratch, format="PNG")


def _is_temporary(path: Path) -> bool:
    """Whether a file is the lock, or an unfinished file that a killed process left."""
    return path.name == LOCK or path.suffix == ".partial"


def _read(record: Path) -> Samples:
    """Read samples.json. Fields that did not exist yet when the file was written get their defaults."""
    try:
        return pydantic.TypeAdapter(Samples).validate_json(record.read_bytes())
    except pydantic.ValidationError:
        raise InputError(f"{record}: is damaged or of another version; use another sampling.output") from None


def _fields(run: SampleRun) -> dict[str, Any]:
    return {f"{name}.{field}": value for name, part in configs.plain(run).items() for field, value in part.items()}


# --- Fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint_loras(choices: Sequence[Choice]) -> str | None:
    """Return a fingerprint of LoRA files and their strengths; None without files."""
    terms = [(files.fingerprint(file), strength) for file, strength in choices]
    return "+".join(digest if strength == 1 else f"{strength!r}*{digest}" for digest, strength in terms) or None


def fingerprint_latents(file: Path | None) -> str | None:
    """Return the fingerprint of a file of initial noise.

    Raises:
        InputError: the file does not exist.
    """
    if file is None:
        return None
    if not file.is_file():
        raise InputError(f"sampling.latents={file}: no such file; expected a safetensors file")
    return files.fingerprint(file)


def fingerprint_weights(paths: Sequence[Path]) -> str:
    """Return a fingerprint of large files: a hash of the size of each file and of 256 chunks spread evenly over it.

    At most 16 MiB of each file are read, so that a model of many gigabytes takes only a second; smaller files are read
    completely. Training, conversion and merging change values everywhere in a model, which is always detected. A change
    of a few values in a large file may go undetected.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as stream:
            for number in range(NUM_CHUNKS):
                start = max(number * CHUNK_BYTES, number * (size - CHUNK_BYTES) // (NUM_CHUNKS - 1))
                stream.seek(start)
                digest.update(stream.read(CHUNK_BYTES))
    return digest.hexdigest()[:16]
