"""Runs of tfm-prepare on five small clips, with encoders that need no model."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_encoders import use_fakes

from tfm_jax import video
from tfm_jax.config import ClipConfig, DataConfig, ModelConfig
from tfm_jax.data import blocks
from tfm_jax.data.prepare import PrepareRun


def write_clips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write five clips of 5 frames; use encoders that need no model, and blocks of two rows."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(5):
        video.write_clip(folder / f"{n}.mp4", rng.integers(0, 255, (5, 16, 16, 3), np.uint8), 16)
    (folder / "metadata.csv").write_text("video,prompt\n" + "".join(f"{n}.mp4,prompt {n}\n" for n in range(5)))
    use_fakes(monkeypatch)
    monkeypatch.setattr(blocks, "MAX_ROWS", 2)
    return folder


def prepare_run(clips: Path, path: Path | None = None, **data) -> PrepareRun:
    return PrepareRun(
        model=ModelConfig(path=Path("weights"), dim=96, ffn_dim=256, heads=4, layers=4),
        clip=ClipConfig(frames=5, height=16, width=16),
        data=DataConfig(source=clips, path=path or clips.with_name("latents"), **{"max_rejected": 0.5} | data),
    )


def with_clip(run: PrepareRun, **fields) -> PrepareRun:
    return dataclasses.replace(run, clip=dataclasses.replace(run.clip, **fields))


def beside(clips: Path) -> list[str]:
    """Return the names of what a run has left beside the folder of the clips."""
    return sorted(path.name for path in clips.parent.iterdir() if path != clips)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def never(*_, **__):
    pytest.fail("called")
