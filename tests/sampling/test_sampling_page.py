"""The programs in docs/sampling.md."""

import json
import re
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import utils
from helpers import diffsynth_reference
from helpers.paths import ROOT, WAN_TINY
from safetensors.torch import save_file

from tfm_jax.config import load
from tfm_jax.lora.files import Adapter, Lora, write_lora
from tfm_jax.sampling.decoding import decode
from tfm_jax.sampling.latents import read_latents
from tfm_jax.sampling.pipeline import SampleRun, sample
from tfm_jax.wan import load_vae
from tfm_jax.wan.names import BlockLinear

PAGE = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
PROMPT = "a red disc moves right, fast, on a black ground"


def program(heading: str, language: str) -> str:
    """Return the program in a section of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    [found] = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return found


SMALL = {
    '"weights/Wan2.1-T2V-1.3B-Diffusers"': repr("model"),
    '"euler", 50': "SOLVER, 4",
    "81, 480, 832": "5, 32, 48",
    '"cuda", torch.bfloat16': '"cpu", torch.float32',
    '"A red kite dives over the dunes."': repr(PROMPT),
}
"""What the test changes in the program for diffusers, to run it with the folder `model`."""

SMALL_DIFFSYNTH = {
    "torch.bfloat16": "torch.float32",
    '"cuda"': '"cpu"',
    '"A red kite dives over the dunes."': repr(PROMPT),
    "num_frames=81": "num_frames=5",
    "height=480": "height=32",
    "width=832": "width=48",
    "num_inference_steps=50": "num_inference_steps=4",
}
"""What the test changes in the program for DiffSynth."""


def execute(text: str, changes: dict[str, str], variables: dict[str, Any]) -> dict[str, Any]:
    """Run a program with changes in its text; return its variables."""
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    exec(compile(text, "docs/sampling.md", "exec"), variables)
    return variables


def our_video(solver: str, negative: str) -> np.ndarray:
    """Sample from `noise.safetensors` with `kites.safetensors`, and return the frames."""
    options = {
        "clip.frames": 5, "clip.height": 32, "clip.width": 48, "sampling.solver": solver, "sampling.steps": 4,
        "sampling.guidance": 5.0, "sampling.negative_prompt": negative, "sampling.prompt": PROMPT,
        "sampling.lora": "kites.safetensors", "sampling.latents": "noise.safetensors", "sampling.output": "samples",
        "model.path": "model",
    }  # fmt: skip
    run = load(SampleRun, "wan_tiny", options)
    samples = sample(run)
    [latents] = read_latents(samples.latents_file(0), (2, 4, 6, 16))
    return np.stack(list(decode(load_vae(WAN_TINY), latents[None], [0], run)[0]))


def assert_same_pixels(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compare pixels in 0..255."""
    assert ours.shape == theirs.shape
    error = np.square((ours.astype(np.float32) - theirs) / 255).mean()
    assert -10 * np.log10(error) >= 45


@pytest.fixture
def lora(tmp_path, monkeypatch):
    """Work in a folder with the file of a LoRA and the tiny model, which here takes 512 text tokens, like Wan2.1."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WAN_TINY, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    del values["text_len"]
    file.write_text(json.dumps(values), encoding="utf-8")
    rng = np.random.default_rng(0)
    draw = [np.float32(rng.normal(size=shape) / 12) for shape in ((4, 128), (128, 4))]
    adapters = {BlockLinear(layer, "self_attn.q"): Adapter(*draw) for layer in range(8)}
    write_lora(tmp_path / "kites.safetensors", Lora(adapters, 4, 4.0), dtype=np.dtype(np.float32))


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_the_program_for_diffusers_makes_our_video(lora, monkeypatch, solver):
    shown = []
    monkeypatch.setattr(utils, "export_to_video", lambda frames, file, fps: shown.append((frames, file, fps)))
    variables = execute(program("diffusers", "python"), SMALL, {"SOLVER": solver})
    [(frames, file, fps)] = shown
    assert (file, fps) == ("kite.mp4", 16)
    assert_same_pixels(our_video(solver, variables["NEGATIVE"]), 255 * np.asarray(frames))


def test_the_program_for_diffsynth_makes_our_video(lora, monkeypatch, capsys):
    """The weights are not downloaded, but those of the tiny model."""
    module, shown, wanted = diffsynth_reference.wan_video(), [], []
    networks = diffsynth_reference.networks(WAN_TINY)

    def load_models(pipe, configs, vram_limit):
        wanted.extend(config.origin_file_pattern for config in configs)
        return SimpleNamespace(fetch_model=lambda name, index=None: networks.get(name))

    def find_tokenizer(config):
        monkeypatch.setattr(config, "path", str(WAN_TINY / "tokenizer"))

    monkeypatch.setattr(module.WanVideoPipeline, "download_and_load_models", load_models)
    monkeypatch.setattr(module.ModelConfig, "download_if_necessary", find_tokenizer)
    monkeypatch.setattr(
        sys.modules["diffsynth.utils.data"],
        "save_video",
        lambda frames, file, **more: shown.append((frames, file, more)),
    )
    text = program("DiffSynth-Studio", "python")
    execute(text, SMALL_DIFFSYNTH, {})
    assert len(wanted) == 3
    assert "8 tensors are fused by LoRA" in capsys.readouterr().out
    [(frames, file, more)] = shown
    assert (file, more["fps"]) == ("kite.mp4", 16)

    noise = torch.randn((1, 16, 2, 4, 6), generator=torch.Generator().manual_seed(0))
    save_file({"latents": noise}, "noise.safetensors")
    [negative] = re.findall(r'negative_prompt="(.*)"', text)
    assert_same_pixels(our_video("euler", negative), np.stack([np.asarray(frame) for frame in frames]))


def test_the_program_for_comfyui_is_well_formed():
    nodes = json.loads(program("ComfyUI", "json"))
    links = [link for node in nodes.values() for link in node["inputs"].values() if isinstance(link, list)]
    assert {name for name, _ in links} <= set(nodes)
    assert set(nodes) - {name for name, _ in links} == {"save"}
