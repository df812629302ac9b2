"""The programs in docs/sampling.md."""

import json
import re

import numpy as np
import pytest
from diffusers import utils
from helpers.paths import ROOT, WAN_TINY

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
    '"weights/Wan2.1-T2V-1.3B-Diffusers"': repr(str(WAN_TINY)),
    '"euler", 50': "SOLVER, 4",
    "81, 480, 832": "5, 32, 48",
    '"cuda", torch.bfloat16': '"cpu", torch.float32',
    '"A red kite dives over the dunes."': repr(PROMPT),
}
"""What the test changes in the program for diffusers, to run it with the tiny model."""


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_the_program_for_diffusers_makes_our_video(tmp_path, monkeypatch, solver):
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr(utils, "export_to_video", lambda frames, file, fps: shown.append((frames, file, fps)))
    rng = np.random.default_rng(0)
    draw = [np.float32(rng.normal(size=shape) / 12) for shape in ((4, 128), (128, 4))]
    adapters = {BlockLinear(layer, "self_attn.q"): Adapter(*draw) for layer in range(8)}
    write_lora(tmp_path / "kites.safetensors", Lora(adapters, 4, 4.0), dtype=np.dtype(np.float32))
    text = program("diffusers", "python")
    for old, new in SMALL.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    variables = {"SOLVER": solver}
    exec(compile(text, "docs/sampling.md", "exec"), variables)
    [(frames, file, fps)] = shown
    assert (file, fps) == ("kite.mp4", 16)

    options = {
        "clip.frames": 5, "clip.height": 32, "clip.width": 48, "sampling.solver": solver, "sampling.steps": 4,
        "sampling.guidance": 5.0, "sampling.negative_prompt": variables["NEGATIVE"], "sampling.prompt": PROMPT,
        "sampling.lora": "kites.safetensors", "sampling.latents": "noise.safetensors", "sampling.output": "samples",
    }  # fmt: skip
    run = load(SampleRun, "wan_tiny", options)
    samples = sample(run)
    [latents] = read_latents(samples.latents_file(0), (2, 4, 6, 16))
    ours = np.stack(list(decode(load_vae(WAN_TINY), latents[None], [0], run)[0]))
    error = np.square(ours / 255 - np.asarray(frames)).mean()
    assert -10 * np.log10(error) >= 45


def test_the_other_programs_are_well_formed():
    compile(program("DiffSynth-Studio", "python"), "docs/sampling.md", "exec")
    nodes = json.loads(program("ComfyUI", "json"))
    links = [link for node in nodes.values() for link in node["inputs"].values() if isinstance(link, list)]
    assert {name for name, _ in links} <= set(nodes)
    assert set(nodes) - {name for name, _ in links} == {"save"}
