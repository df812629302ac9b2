"""tfm-lora: inspect, convert and diff, on files of every dialect and on one like that of the TFM release."""

import math

import numpy as np
import pytest
import torch
from helpers.lora_files import (
    LAYERS,
    RANK,
    assert_same_deltas,
    deltas,
    file_metadata,
    make_lora,
    official_file,
    official_zeros,
    rewritten,
)
from helpers.wan_reference import SIZES, reference_transformer
from safetensors.torch import load_file

from tfm_jax.lora.applying import check_fits
from tfm_jax.lora.files import read_lora, write_lora
from tfm_jax.lora.keys import DIALECT_KEYS, DIALECTS
from tfm_jax.wan.names import BlockLinear
from tfm_jax.wan.tensors import open_safetensors, safetensors_dtypes
from tfm_jax.wan.transformer import TransformerConfig


@pytest.mark.parametrize("target", DIALECTS)
@pytest.mark.parametrize("source", DIALECTS)
def test_every_dialect_converts_to_every_other(call, tmp_path, source, target):
    write_lora(tmp_path / "a", make_lora(6.0), source, np.float32, {"steps": "7"})
    outcome = call("lora", "convert", tmp_path / "a", tmp_path / "b", f"--dialect={target}")
    assert outcome.out == f"{tmp_path}/b: 20 adapters ({target}, float32)\n"
    assert_same_deltas(deltas(read_lora(tmp_path / "b")), deltas(make_lora(6.0)))
    assert file_metadata(tmp_path / "b")["steps"] == "7"
    assert f"dialect {target} (for " in call("lora", "inspect", tmp_path / "b").out


def test_the_file_of_the_release(call, tmp_path):
    file = official_file(tmp_path / "tfm-lora.safetensors")
    outcome = call("lora", "inspect", file, f"--png={tmp_path}/norms.png")
    assert outcome.code == 0, outcome.err
    assert "dialect diffsynth (for DiffSynth), bfloat16, rank 32, alpha 32" in outcome.out
    assert "adapters on 400 of the 400 linear layers in 40 blocks: self_attn.q, " in outcome.out
    (row,) = [line for line in outcome.out.splitlines() if line.startswith("cross_attn.v ")]
    assert len(row.split()[1]) == 40
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    for dialect in DIALECTS:
        target = tmp_path / dialect
        assert call("lora", "convert", file, target, f"--dialect={dialect}").out.endswith(
            f"400 adapters ({dialect}, bfloat16)\n"
        )
        before, after = load_file(file), load_file(target)
        assert len(after) == 1200 if dialect == "kohya" else 800
        a = DIALECT_KEYS[dialect].key(BlockLinear(0, "self_attn.q"), "A")
        assert torch.equal(after[a], before["blocks.0.self_attn.q.lora_A.default.weight"])


def test_a_file_of_the_size_of_the_release(call, tmp_path):
    file = official_zeros(tmp_path / "tfm-lora.safetensors")
    outcome = call("lora", "inspect", file)
    assert "dialect diffsynth (for DiffSynth), bfloat16, rank 32, alpha 32" in outcome.out, outcome.err
    assert "adapters on 400 of the 400 linear layers in 40 blocks" in outcome.out
    assert call("lora", "convert", file, tmp_path / "comfy").out.endswith("400 adapters (comfy, bfloat16)\n")
    before, after = safetensors_shapes(file), safetensors_shapes(tmp_path / "comfy")
    assert after == {f"diffusion_model.{key.replace('.default', '')}": about for key, about in before.items()}
    assert sum(math.prod(shape) for shape, _ in after.values()) == 153_354_240
    check_fits(read_lora(tmp_path / "comfy"), TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40))


def safetensors_shapes(file):
    """Map the keys of a file to shapes and dtypes."""
    dtypes = safetensors_dtypes(file)
    return {name: (tensor.shape, dtypes[name]) for name, tensor in open_safetensors(file).items()}


def test_inspect_shows_the_norm_of_every_change(call, tmp_path):
    lora = make_lora(6.0)
    write_lora(tmp_path / "a", lora, "comfy", np.float32)
    norms = [np.linalg.norm(delta) for linear, delta in deltas(lora).items() if linear.name == "ffn.0"]
    (row,) = [line for line in call("lora", "inspect", tmp_path / "a").out.splitlines() if line.startswith("ffn.0 ")]
    assert row.split()[2:] == [f"{min(norms):.3g}", "to", f"{max(norms):.3g}"]


def test_inspect_of_some_layers_and_other_spellings(call, tmp_path):
    write_lora(tmp_path / "a", make_lora(targets=["self_attn.q", "ffn.2"]))
    assert (
        "adapters on 4 of the 20 linear layers in 2 blocks: self_attn.q, ffn.2"
        in call("lora", "inspect", tmp_path / "a").out
    )

    def double(tensors):
        for part, axis in (("A", 0), ("B", 1)):
            key = f"diffusion_model.blocks.1.ffn.0.lora_{part}.weight"
            tensors[key] = torch.cat([tensors[key]] * 2, axis)

    assert (
        "float32, rank 4 to 8, alpha equal to the rank"
        in call("lora", "inspect", rewritten(tmp_path / "c", double)).out
    )

    def respell(tensors):
        return {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in tensors.items()}

    outcome = call("lora", "inspect", rewritten(tmp_path / "b", respell))
    assert "in no dialect that we write" in outcome.out
    assert "keys such as diffusion_model.blocks.0.cross_attn.k.lora_down.weight" in outcome.out


def test_inspect_checks_the_model(call, tmp_path):
    reference_transformer(SIZES["small"]).save_pretrained(tmp_path / "model" / "transformer")
    write_lora(tmp_path / "a", make_lora())
    outcome = call("lora", "inspect", tmp_path / "a", f"--model={tmp_path}/model")
    assert outcome.code == 2
    assert "LoRA A of blocks.0.self_attn.q is [4, 24]; expected [4, 48]" in outcome.err


def test_diff(call, tmp_path):
    lora = make_lora()
    write_lora(tmp_path / "a", lora, "comfy", np.float32)
    half = {linear: adapter._replace(b=adapter.b * -0.5) for linear, adapter in lora.adapters.items()}
    write_lora(tmp_path / "b", lora._replace(adapters=half), "kohya", np.float32)
    lines = call("lora", "diff", tmp_path / "a", tmp_path / "b").out.splitlines()
    assert len(lines) == 10 * LAYERS + 1
    assert all(line.endswith("cosine -1.0000  norm ratio   0.5000") for line in lines)

    other = make_lora(alpha=7.0, targets=["self_attn.q"])._replace(rank=RANK)
    write_lora(tmp_path / "c", other, "comfy", np.float32)
    one, want = deltas(lora), deltas(other)
    first = next(iter(want))
    outcome = call("lora", "diff", tmp_path / "a", tmp_path / "c")
    cosine = (one[first] * want[first]).sum() / np.linalg.norm(one[first]) / np.linalg.norm(want[first])
    ratio = np.linalg.norm(want[first]) / np.linalg.norm(one[first])
    assert outcome.out.splitlines()[0].split() == [
        str(first),
        "cosine",
        f"{cosine:.4f}",
        "norm",
        "ratio",
        f"{ratio:.4f}",
    ]
    assert outcome.out.splitlines()[-1] == f"only in {tmp_path}/a: 18 linear layers, such as blocks.0.self_attn.k"


def test_refusals(call, tmp_path):
    write_lora(tmp_path / "a", make_lora())
    write_lora(tmp_path / "wide", make_lora(ffn_dim=44))
    write_lora(tmp_path / "q", make_lora(targets=["self_attn.q"]))
    write_lora(tmp_path / "k", make_lora(targets=["self_attn.k"]))
    before = sorted(tmp_path.iterdir())
    for arguments, words in (
        (("convert", tmp_path / "a", tmp_path / "k"), "k: already exists"),
        (("convert", tmp_path / "q", tmp_path / "new", "--dialect=kohya"), "blocks.0.self_attn.k has none"),
        (("diff", tmp_path / "q", tmp_path / "k"), "adapters on different linear layers"),
        (("diff", tmp_path / "a", tmp_path / "wide"), "blocks.0.ffn.0: the widths are 24 and 40 in one LoRA"),
        (("inspect", tmp_path / "none"), "none: no such file"),
        (("extract", tmp_path, tmp_path, tmp_path / "new", "--rank=0"), "--rank=0: expected at least 1"),
    ):
        outcome = call("lora", *arguments)
        assert outcome.code == 2, outcome
        assert words in outcome.err, outcome.err
    assert sorted(tmp_path.iterdir()) == before
