"""A world for tests of the programs: a tiny model, four clips, and a configuration for all programs."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.paths import ROOT
from helpers.random_model import TEXT_DIM, write_model

from tfm_jax.lora.adapters import split_lora
from tfm_jax.moving_shapes.world import write_clips
from tfm_jax.train import loop
from tfm_jax.wan.text_encoder import UMT5Encoder
from tfm_jax.wan.vae import WanVae

PROMPTS = ["a red disc moves right, slowly", "一个蓝色的圆 🔵"]


class Outcome(NamedTuple):
    """How a program ended."""

    code: int
    out: str
    err: str


def program(name: str) -> ModuleType:
    """Return the module in `tfm_jax.cli` that the script of this name runs or, without one, the script itself."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return sys.modules.get(script.main.__module__, script)


def execute(name: str, argv: Sequence[str]) -> None:
    """Run a program in this process, and raise its errors."""
    module = program(name)
    getattr(module, "execute", module.main)(argv)


def write_world(folder: Path, steps: int, checkpoint_every: int = 500) -> None:
    """Write a world, in which the real programs have prepared the clips and trained on them."""
    write_clips(folder / "clips", 4, frames=5, size=(32, 48))
    write_model(folder / "model", PROMPTS)
    (folder / "prompts.txt").write_text(PROMPTS[0], encoding="utf-8")
    values = {
        "model": {"path": folder / "model", "dim": 96, "ffn_dim": 256, "heads": 4, "layers": 4, "dtype": "float32"},
        "clip": {"frames": 5, "height": 32, "width": 48},
        "data": {"source": folder / "clips", "path": folder / "latents"},
        "lora": {"rank": 2},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"output": folder / "run", "steps": steps, "batch_size": 2, "checkpoint_every": checkpoint_every},
        "sampling": {"prompts": folder / "prompts.txt", "output": folder / "samples", "steps": 2},
    }
    (folder / "config.yaml").write_text(json.dumps(values, default=str), encoding="utf-8")  # JSON is YAML
    config = ["--config", str(folder / "config.yaml")]
    execute("prepare_data", config)
    execute("train", config)


def without_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make encoders return constants and training steps change nothing, so that a world takes seconds to write."""
    latents = np.random.default_rng(0).standard_normal((1, 2, 4, 6, 16), np.float32)  # unlike zeros, not compressible

    def step(state, frozen, batch):
        return state._replace(step=state.step + 1), {"loss": jnp.float32(1)}

    def init_lora(model, key, mesh):
        rng = np.random.default_rng(0)
        lora = split_lora(model).lora
        nnx.update(model, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), lora))

    monkeypatch.setattr(loop, "_compile", lambda *_: step)
    monkeypatch.setattr(loop, "init_lora", init_lora)
    monkeypatch.setattr(WanVae, "encode", lambda vae, video: latents)
    monkeypatch.setattr(UMT5Encoder, "__call__", lambda encoder, ids, mask: jnp.zeros((*ids.shape, TEXT_DIM)))
