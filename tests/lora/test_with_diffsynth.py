"""DiffSynth-Studio's own loader: which files it loads, and that they do in its transformer what they do in ours."""

import re

import jax
import numpy as np
import pytest
import torch
from helpers import diffsynth_reference
from helpers.lora_files import deltas, official_file, random_lora
from helpers.wan_reference import SIZES, inputs, reference_transformer, relative
from safetensors.torch import load_file, save_file

from tfm_jax.config import ModelConfig
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.files import read_lora, write_lora
from tfm_jax.wan import load_base
from tfm_jax.wan.names import transformer_rows
from tfm_jax.wan.transformer import WanTransformer

CONFIG = SIZES["small"]
BATCH = inputs(CONFIG, 1, 2, 4, 6)
MODULES = 10 * CONFIG.layers


@pytest.fixture(scope="module")
def weights():
    state = reference_transformer(CONFIG).state_dict()
    return {row.original: state[row.diffusers] for row in transformer_rows(CONFIG.layers)}


@pytest.fixture
def loaded(weights, capsys):
    """Load a file with DiffSynth's pipeline: file -> the transformer and the number of modules that it changed."""
    pipe = diffsynth_reference.wan_video().WanVideoPipeline(device="cpu", torch_dtype=torch.float32)

    def load(file) -> tuple[torch.nn.Module, int]:
        pipe.dit = diffsynth_reference.transformer(CONFIG, {name: value.clone() for name, value in weights.items()})
        capsys.readouterr()
        pipe.load_lora(pipe.dit, str(file), alpha=1.0)
        return pipe.dit, int(re.match(r"(\d+) tensors are fused", capsys.readouterr().out)[1])

    return load


def assert_changed(dit, weights, lora) -> None:
    """Check that the weights changed by what `lora` says, and nothing else."""
    after, want = dit.state_dict(), {f"{linear}.weight": delta for linear, delta in deltas(lora).items()}
    for name, before in weights.items():
        np.testing.assert_allclose(after[name] - before, want.get(name, 0), rtol=0, atol=2e-6, err_msg=name)


def added_alpha(tensors):
    return {**tensors, **{key.replace("lora_A.weight", "alpha"): torch.tensor(6.0) for key in tensors if "_A" in key}}


def renamed(old, new):
    return lambda tensors: {re.sub(old, new, key): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("dialect", "change", "count"),
    [
        ("comfy", dict, MODULES),
        ("diffsynth", dict, MODULES),
        ("diffusers", dict, 0),
        ("kohya", dict, 0),
        ("diffsynth", renamed(r"\.default", ""), MODULES),
        ("comfy", renamed(r"\.weight", ".default.weight"), MODULES),
        ("comfy", added_alpha, MODULES),
        ("diffsynth", renamed("^", "pipe.dit."), 0),
    ],
)
@pytest.mark.parametrize("alpha", [4.0, 6.0])
def test_which_files_it_loads(tmp_path, weights, loaded, dialect, change, count, alpha):
    """The table of dialects in `tfm_jax/lora/files.py`, and other spellings."""
    lora = random_lora(CONFIG, 4, alpha)
    file = tmp_path / "lora.safetensors"
    write_lora(file, lora._replace(alpha=4.0) if change is added_alpha else lora, dialect, np.float32)
    save_file(change(load_file(file)), file)
    dit, matched = loaded(file)
    assert matched == count
    if count:
        assert_changed(dit, weights, lora._replace(alpha=6.0) if change is added_alpha else lora)


@pytest.fixture(scope="module")
def velocity(tmp_path_factory):
    """Our velocity with a LoRA file; None stands for the base model."""
    folder = tmp_path_factory.mktemp("model")
    reference_transformer(CONFIG).save_pretrained(folder / "transformer")
    model = ModelConfig(path=folder, dtype="float32", dim=48, ffn_dim=80, heads=2, layers=2)
    call = jax.jit(WanTransformer.__call__)

    def compute(file):
        transformer = load_base(model)
        if file:
            load_adapters(transformer, read_lora(file))
        return np.asarray(call(transformer, **BATCH))

    return compute


def test_files_do_there_what_they_do_here(call, tmp_path, loaded, velocity):
    """Files of every dialect, converted for DiffSynth, and one like that of the TFM release."""
    official = official_file(tmp_path / "tfm.safetensors", CONFIG.layers, CONFIG.dim, CONFIG.ffn_dim, rank=4)
    lora = random_lora(CONFIG, 4, 6.0)
    for source in ("comfy", "diffsynth", "diffusers", "kohya"):
        write_lora(tmp_path / source, lora, source, np.float32)
    base, ours = velocity(None), {"release": velocity(official), "random": velocity(tmp_path / "kohya")}
    assert relative(ours["random"], base) > 1e-2
    for name, source in (("release", official), *(("random", tmp_path / d) for d in ("diffusers", "kohya"))):
        for dialect in ("comfy", "diffsynth"):
            target = tmp_path / f"{source.name}-{dialect}.safetensors"
            assert call("lora", "convert", source, target, f"--dialect={dialect}", "--dtype=float32").code == 0
            dit, matched = loaded(target)
            assert matched == MODULES
            assert relative(ours[name], diffsynth_reference.run(dit, BATCH)) <= 1e-5
    dit, matched = loaded(official)
    assert matched == MODULES
    assert relative(ours["release"], diffsynth_reference.run(dit, BATCH)) <= 1e-5


def test_adapters_outside_the_blocks(tmp_path, weights, loaded):
    lora = random_lora(CONFIG, 3, 3.0, ("text_embedding.0", "time_projection.1", "head.head"))
    write_lora(tmp_path / "lora.safetensors", lora, "comfy", np.float32)
    dit, matched = loaded(tmp_path / "lora.safetensors")
    assert matched == MODULES + 3
    assert_changed(dit, weights, lora)
