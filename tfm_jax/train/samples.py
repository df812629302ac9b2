"""Samples during training: videos from fixed prompts and noise, with the weights that are being trained."""

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from tfm_jax import files, interrupts, processes, video
from tfm_jax.console import log
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import without_lora
from tfm_jax.sampling.decoding import decode
from tfm_jax.sampling.outputs import SampleRun
from tfm_jax.sampling.pipeline import check_model, embed, make_rounds, read_sampling_prompts, sample_round
from tfm_jax.sharding import check_split, num_shards
from tfm_jax.train.run import TrainRun
from tfm_jax.train.watching import About, Event, Watcher
from tfm_jax.wan import load_vae
from tfm_jax.wan.transformer import WanTransformer, token_grid


class SampleVideos(Watcher):
    """Samples the prompts of `sampling.prompts` every `train.sample_every` steps and after the last step.

    Each prompt gets one video, from the noise of `sampling.seed`.

    The videos go to samples/step_000500/000.mp4, ...; those of the base model, once, to samples/base/. Their frames
    equal those that tfm-sample makes with the exported LoRA. The text encoder is loaded once, before the transformer,
    and freed; the autoencoder is loaded for each use.

    Raises:
        InputError: the prompts, the tokenizer, the text encoder or the autoencoder are missing or damaged.
    """

    def __init__(self, run: TrainRun, mesh: Mesh):
        self._every = run.train.sample_every or 0
        self._from_start = run.lora.init is not None
        self._mesh = mesh
        sampling = dataclasses.replace(run.sampling, videos_per_prompt=1, latents=None)
        self._run = SampleRun(model=run.model, clip=run.clip, sampling=sampling, mesh=run.mesh)
        _ = run.clip.rate  # an error now rather than after the first steps
        check_split(run.model.heads, math.prod(token_grid(run.clip.latent_size)), mesh)
        self._prompts = read_sampling_prompts(run.sampling)
        check_model(run.model)
        processes.print_once(f"samples: {len(self._prompts)} prompts; encoding them ...")
        self._text = embed(self._run, [*self._prompts, run.sampling.negative_prompt], mesh)
        self._rounds = make_rounds(len(self._prompts), num_shards("batch", mesh), set(range(len(self._prompts))))

    def open(self, about: About) -> None:
        self._folder, self._last = about.output / "samples", about.last
        record, text = self._folder / "prompts.txt", "".join(f"{prompt}\n" for prompt in self._prompts)
        if not record.exists():
            if processes.is_first():
                with files.replacing(record) as scratch:
                    scratch.write_text(text, encoding="utf-8")
        elif record.read_text(encoding="utf-8") != text:
            other = f"the samples in {self._folder} were made from other prompts"
            raise InputError(f"sampling.prompts={self._run.sampling.prompts}: {other}; expected the same")
        # Remembered from now on, because processes may see new folders of a shared disk at different times.
        self._done = {folder.name for folder in self._folder.glob("*") if folder.is_dir()}

    def wants(self, step: int) -> bool:
        return bool(self._folders_due(step))

    def _folders_due(self, step: int) -> list[Path]:
        """Return the folders of the videos that are still to be made at this step."""
        folders = [self._folder / "base"]
        if (step % self._every == 0 or step == self._last) and (step > 0 or self._from_start):
            folders.append(self._folder / f"step_{step:06}")
        return [folder for folder in folders if folder.name not in self._done]

    def look(self, step: int, model: WanTransformer) -> Iterator[Event]:
        for folder in self._folders_due(step):
            is_base = folder.name == "base"
            processes.print_once(f"sampling {len(self._prompts)} videos for {folder} ...")
            if not self._make(folder, without_lora(model) if is_base else model):
                return  # a signal arrived
            self._done.add(folder.name)
            yield Event("samples", 0 if is_base else step, {"folder": str(folder)})

    def _make(self, folder: Path, model: WanTransformer) -> bool:
        """Write the videos to a folder, all of them or none. A single process stops at a signal and returns False."""
        latents: dict[int, np.ndarray] = {}
        try:
            for numbers in self._rounds:
                sampled = sample_round(self._run, model, self._text, numbers, self._mesh, on_step=_stop_if_requested)
                latents |= zip(numbers, sampled, strict=True)
            if processes.is_first():
                self._write(folder, latents)
        except _Stopped:
            return False
        return True

    def _write(self, folder: Path, latents: dict[int, np.ndarray]) -> None:
        scratch = folder.with_name(f".{folder.name}.partial")
        scratch.mkdir(exist_ok=True)
        try:
            self._write_videos(scratch, latents)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _write_videos(self, folder: Path, latents: dict[int, np.ndarray]) -> None:
        vae = load_vae(self._run.model.path)
        for number in range(len(self._prompts)):
            _stop_if_requested()
            try:
                frames = decode(vae, latents[number][None], [number], self._run)
                video.write_clip(folder / f"{number:03}.mp4", frames[number], self._run.clip.rate)
            except InputError as error:  # such as latents that are not finite, which must not stop the training
                log(f"note: {error}; no video is written")


class _Stopped(Exception):
    """A signal arrived."""


def _stop_if_requested() -> None:
    if interrupts.requested() and not processes.is_distributed():
        raise _Stopped
