"""LoRA files as we write them: keys, metadata, and nothing half-written."""

import numpy as np
import pytest
import torch
from helpers.lora_files import LAYERS, RANK, assert_same_deltas, deltas, file_metadata, make_lora
from safetensors.torch import load_file

from tfm_jax.errors import InputError
from tfm_jax.lora.files import read_lora, write_lora
from tfm_jax.lora.keys import DIALECTS
from tfm_jax.wan.names import BLOCK_LINEARS, BlockLinear


@pytest.mark.parametrize("dialect", DIALECTS)
def test_float32_round_trip_is_exact(tmp_path, dialect):
    lora = make_lora()
    write_lora(tmp_path / "new" / "lora.safetensors", lora, dialect, np.float32, {"steps": "7"})
    back = read_lora(tmp_path / "new" / "lora.safetensors")
    assert (back.rank, back.alpha, dict(back.metadata)) == (RANK, RANK, {"steps": "7"})
    assert list(back.adapters) == list(lora.adapters)
    for linear, adapter in lora.adapters.items():
        np.testing.assert_array_equal(back.adapters[linear].a, adapter.a)
        np.testing.assert_array_equal(back.adapters[linear].b, adapter.b)
        assert back.adapters[linear].a.dtype == np.float32
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["lora.safetensors"]
    assert (tmp_path / "new" / "lora.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("alpha", [1.0, 10.5])
def test_scale_survives(tmp_path, dialect, alpha):
    lora = make_lora(alpha)
    write_lora(tmp_path / "lora.safetensors", lora, dialect, np.float32)
    back = read_lora(tmp_path / "lora.safetensors")
    assert back.alpha == (RANK if dialect in ("comfy", "diffsynth") else alpha)
    assert not back.metadata  # alpha in there would be applied again in the next file written with it
    assert_same_deltas(deltas(back), deltas(lora))


def test_more_than_ten_blocks_come_back_in_order(tmp_path):
    lora = make_lora(layers=11)
    write_lora(tmp_path / "lora.safetensors", lora)
    assert list(read_lora(tmp_path / "lora.safetensors").adapters) == list(lora.adapters)


def test_the_same_lora_is_the_same_file(tmp_path):
    lora, files = make_lora(), set()
    metadata = {
        name: f'\u00e9 \t\x7f " \\ {name}' for name in ("base_model", "steps", "objective", "rho", "beta", "rank")
    }
    for _ in range(8):
        write_lora(tmp_path / "lora.safetensors", lora, metadata=metadata)
        files.add((tmp_path / "lora.safetensors").read_bytes())
    assert len(files) == 1
    assert file_metadata(tmp_path / "lora.safetensors") == {**metadata, "format": "pt"}
    assert read_lora(tmp_path / "lora.safetensors").adapters.keys() == lora.adapters.keys()


def test_default_is_comfy_in_bfloat16(tmp_path):
    lora = make_lora()
    write_lora(tmp_path / "lora.safetensors", lora, metadata={"base_model": "Wan2.1-T2V-1.3B"})
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert file_metadata(tmp_path / "lora.safetensors") == {"format": "pt", "base_model": "Wan2.1-T2V-1.3B"}
    q = tensors["diffusion_model.blocks.1.self_attn.q.lora_A.weight"]
    want = torch.tensor(np.array(lora.adapters[BlockLinear(1, "self_attn.q")].a)).bfloat16()
    assert torch.equal(q, want)


@pytest.mark.parametrize(
    ("dialect", "keys"),
    [
        (
            "comfy",
            [
                "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
                "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
                "diffusion_model.blocks.1.ffn.2.lora_B.weight",
            ],
        ),
        ("diffsynth", ["blocks.0.self_attn.q.lora_A.default.weight", "blocks.1.ffn.0.lora_B.default.weight"]),
        (
            "diffusers",
            [
                "transformer.blocks.0.attn1.to_q.lora_A.weight",
                "transformer.blocks.0.attn2.to_out.0.lora_B.weight",
                "transformer.blocks.1.ffn.net.0.proj.lora_A.weight",
                "transformer.blocks.1.ffn.net.2.lora_A.weight",
            ],
        ),
        (
            "kohya",
            [
                "lora_unet_blocks_0_self_attn_q.lora_down.weight",
                "lora_unet_blocks_0_self_attn_q.lora_up.weight",
                "lora_unet_blocks_0_self_attn_q.alpha",
                "lora_unet_blocks_1_ffn_2.alpha",
            ],
        ),
    ],
)
def test_keys_of_dialect(tmp_path, dialect, keys):
    write_lora(tmp_path / "lora.safetensors", make_lora(alpha=8), dialect)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert set(keys) <= tensors.keys()
    assert len(tensors) == LAYERS * 10 * (3 if dialect == "kohya" else 2)
    down = next(key for key in keys if "lora_A" in key or "lora_down" in key)
    assert tensors[down].shape[0] == RANK
    assert any(key.endswith(".alpha") for key in tensors) == (dialect == "kohya")
    assert ("lora_adapter_metadata" in file_metadata(tmp_path / "lora.safetensors")) == (dialect == "diffusers")


def test_kohya_needs_every_linear_layer(tmp_path):
    lora = make_lora(targets=[name for name in BLOCK_LINEARS if name != "cross_attn.k"])
    with pytest.raises(InputError, match=r"blocks\.0\.cross_attn\.k .*lora\.targets: \[q, k, v, o, ffn\.0, ffn\.2\]"):
        write_lora(tmp_path / "lora.safetensors", lora, "kohya")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"old")
    lora = make_lora()
    lora.adapters[BlockLinear(1, "ffn.0")].b[0, 0] = 1e6
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.0\.lora_B\.weight would not be finite in float16"):
        write_lora(path, lora, dtype=np.float16)
    with pytest.raises(TypeError):
        write_lora(path, lora, metadata={"steps": 7})  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="a directory"):
        write_lora(tmp_path, lora)
