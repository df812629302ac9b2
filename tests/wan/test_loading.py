"""Weights on disk: every layout, conversions between them, and errors for the damage that files really have."""

import json
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import virtual_devices
from helpers.wan_reference import SIZES, inputs, reference_transformer, relative, run_reference, write_original
from safetensors.numpy import load_file, save_file

from tfm_jax.config import ModelConfig
from tfm_jax.errors import InputError
from tfm_jax.wan import load_base, load_text_encoder, load_transformer, load_vae
from tfm_jax.wan.components import COMPONENTS
from tfm_jax.wan.saving import save_model
from tfm_jax.wan.sources import source_from_module
from tfm_jax.wan.tensors import open_safetensors
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder
from tfm_jax.wan.transformer import WanTransformer
from tfm_jax.wan.vae import VaeConfig, WanVae

CONFIG = SIZES["small"]
LOADERS = {"transformer": load_transformer, "vae": load_vae, "text_encoder": load_text_encoder}


@pytest.fixture(scope="module")
def networks():
    text = TextEncoderConfig(vocab_size=40, dim=20, heads=2, head_dim=6, ffn_dim=24, layers=2)
    return {
        "transformer": WanTransformer(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32),
        "vae": WanVae(VaeConfig(base_dim=4), rngs=nnx.Rngs(1)),
        "text_encoder": UMT5Encoder(text, rngs=nnx.Rngs(2)),
    }


def write(networks, directory, layout, dtype=jnp.float32):
    sources = [source_from_module(networks[component.name], component) for component in COMPONENTS]
    save_model(sources, None, directory, layout, dtype)


def equal(ours, theirs) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(ours), nnx.state(theirs)))


@pytest.fixture
def weights(tmp_path):
    """A transformer in the Diffusers layout."""
    reference_transformer(CONFIG).save_pretrained(tmp_path / "model" / "transformer")
    return tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("layout", ["diffusers", "original", "tfm_jax"])
def test_every_layout_holds_every_bit(networks, tmp_path, layout):
    write(networks, tmp_path / "model", layout)
    for name, load in LOADERS.items():
        assert equal(load(tmp_path / "model", dtype=jnp.float32), networks[name])


def test_files_on_disk_are_those_of_the_layouts(networks, tmp_path):
    for layout in ("diffusers", "original"):
        write(networks, tmp_path / layout, layout)
    there = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert there == {
        "diffusers/model_index.json",
        "diffusers/scheduler/scheduler_config.json",
        "diffusers/transformer/config.json",
        "diffusers/transformer/diffusion_pytorch_model.safetensors",
        "diffusers/vae/config.json",
        "diffusers/vae/diffusion_pytorch_model.safetensors",
        "diffusers/text_encoder/config.json",
        "diffusers/text_encoder/model.safetensors",
        "original/config.json",
        "original/diffusion_pytorch_model.safetensors",
        "original/Wan2.1_VAE.pth",
        "original/models_t5_umt5-xxl-enc-bf16.pth",
    }
    state = torch.load(tmp_path / "original" / "Wan2.1_VAE.pth", weights_only=True)
    assert state["decoder.middle.1.to_qkv.weight"].shape == (48, 16, 1, 1)


def test_diffusers_and_transformers_load_what_we_write(networks, tmp_path):
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    write(networks, tmp_path / "model", "diffusers")
    transformer, info = WanTransformer3DModel.from_pretrained(
        tmp_path / "model", subfolder="transformer", output_loading_info=True
    )
    assert not any(info.values())
    batch = inputs(CONFIG, 1, 2, 4, 4)
    ours = jax.jit(WanTransformer.__call__)(networks["transformer"], **batch)
    assert relative(ours, run_reference(transformer.eval(), batch)) <= 1e-5
    _, info = AutoencoderKLWan.from_pretrained(tmp_path / "model", subfolder="vae", output_loading_info=True)
    assert not any(info.values())
    _, info = UMT5EncoderModel.from_pretrained(tmp_path / "model", subfolder="text_encoder", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_bfloat16_files_load_as_float32_files_do(networks, tmp_path):
    """Kernels are rounded only once, and parameters that the network keeps in float32 are float32 on disk too."""
    write(networks, tmp_path / "float32", "diffusers")
    write(networks, tmp_path / "bfloat16", "diffusers", jnp.bfloat16)
    for load in LOADERS.values():
        assert equal(load(tmp_path / "bfloat16", dtype=jnp.bfloat16), load(tmp_path / "float32", dtype=jnp.bfloat16))


def test_shards_and_a_wrapper_prefix_are_read(tmp_path):
    reference = reference_transformer(CONFIG)
    reference.save_pretrained(tmp_path / "shards" / "transformer", max_shard_size="50KB")
    assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 2
    write_original(reference, CONFIG, tmp_path / "wrapped")
    file = tmp_path / "wrapped" / "diffusion_pytorch_model.safetensors"
    save_file({f"model.diffusion_model.{name}": value for name, value in load_file(file).items()}, file)
    assert equal(load_transformer(tmp_path / "shards"), load_transformer(tmp_path / "wrapped"))


def test_parameters_are_split_over_the_mesh_as_they_are_read(weights):
    program = """
import jax, jax.numpy as jnp, numpy as np, sys
from flax import nnx
from tfm_jax.config import MeshConfig
from tfm_jax.sharding import make_mesh
from tfm_jax.wan import load_transformer
mesh = make_mesh(MeshConfig(data=2, fsdp=4))
whole, split = (load_transformer(sys.argv[1], jnp.float32, mesh) for mesh in (None, mesh))
kernel = split.blocks.self_attn.q.kernel[...]
assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 12, 48)}, kernel.sharding
for a, b in zip(jax.tree.leaves(nnx.state(whole)), jax.tree.leaves(nnx.state(split)), strict=True):
    assert (np.asarray(a) == np.asarray(b)).all()
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(weights.parent)],
        env=virtual_devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr


# --- Damaged and wrong files -----------------------------------------------------------------------------------------


def refused(path, *words):
    with pytest.raises(InputError) as error:
        load_transformer(path)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_missing_tensor_names_the_nearest(weights):
    def rename(tensors):
        tensors["blocks.0.attn1.to_qq.weight"] = tensors.pop("blocks.0.attn1.to_q.weight")

    change(weights, rename)
    refused(weights.parents[1], "1 of", "blocks.0.attn1.to_q.weight [48, 48]", "blocks.0.attn1.to_qq.weight")


def test_extra_tensor(weights):
    change(
        weights, lambda tensors: tensors.update({"blocks.0.attn2.add_k_proj.weight": np.zeros((48, 48), np.float32)})
    )
    refused(weights.parents[1], "tensors do not belong to this model", "add_k_proj")


def test_misshapen_tensor(weights):
    change(weights, lambda tensors: tensors.update({"proj_out.weight": np.zeros((64, 40), np.float32)}))
    refused(weights.parents[1], "proj_out.weight has shape [64, 40]; expected [64, 48]")


def test_nan_in_weights(weights):
    change(weights, lambda tensors: tensors["blocks.1.attn1.to_v.weight"].__setitem__((3, 4), np.nan))
    refused(weights.parents[1], f"{weights}: blocks.1.attn1.to_v.weight has a NaN or infinite value")


def test_truncated_file(weights):
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(weights.parents[1], weights.name, "not a complete safetensors file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"", "is empty"),
    ],
)
def test_what_a_failed_download_leaves(weights, content, words):
    weights.write_bytes(content)
    refused(weights.parents[1], str(weights), words)


def write_safetensors(file, header, data):
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_a_tensor_twice_in_one_header(tmp_path):
    """safetensors itself accepts this and uses the last one."""
    tensor = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    file = tmp_path / "model.safetensors"
    write_safetensors(file, b'{"a":' + tensor + b"}", b"1234")
    assert list(open_safetensors(file)) == ["a"]
    write_safetensors(file, b'{"a":' + tensor + b',"a":' + tensor + b"}", b"1234")
    with pytest.raises(InputError, match=r"model\.safetensors: header: not JSON .key 'a' is given twice"):
        open_safetensors(file)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"__metadata__":{"a":"b","a":"c"}}', "key 'a' is given twice"),
        (b"[" * 10_000, "not a complete safetensors file"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', "not a complete safetensors file"),
        (b'{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}', "tensor 'a' has dtype I32; expected one of F64"),
        (b'{"__metadata__":{"a":"%s"}}' % (b"b" * 2**23), "header: more than 8388608 bytes of JSON"),
    ],
)
def test_bad_headers(tmp_path, header, words):
    write_safetensors(tmp_path / "model.safetensors", header, b"1234" if b"F32" in header or b"I32" in header else b"")
    with pytest.raises(InputError, match=words) as caught:
        open_safetensors(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)


def test_damaged_headers(weights):
    """With random bytes in the header, a file is refused or has the same shapes."""
    raw, rng = weights.read_bytes(), random.Random(0)
    expected = {name: entry.shape for name, entry in open_safetensors(weights).items()}
    length = int.from_bytes(raw[:8], "little")
    read = 0
    for _ in range(200):
        damaged = bytearray(raw)
        damaged[rng.randrange(8 + length)] = rng.randrange(256)
        weights.write_bytes(damaged)
        try:
            shapes = {name: entry.shape for name, entry in open_safetensors(weights).items()}
        except InputError:
            continue
        read += 1
        assert sorted(shapes.values()) == sorted(expected.values())
    assert 0 < read < 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        ("{}", "weight_map is None; expected a file for every tensor"),
        ('{"weight_map": ["a"]}', r"weight_map is \['a'\]; expected"),
        ('{"weight_map": {"a": ["b"]}}', r"'a' is in \['b'\]; expected a file in the same directory"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' is given twice"),
    ],
)
def test_a_damaged_index(weights, text, words):
    index = weights.with_name(weights.name + ".index.json")
    index.write_text(text)
    with pytest.raises(InputError, match=f"^{index}: .*{words}"):
        load_transformer(weights.parents[1])


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "gone.safetensors"])
def test_index_that_leads_nowhere(weights, shard):
    index = {"weight_map": {"patch_embedding.weight": shard}}
    weights.with_name(weights.name + ".index.json").write_text(json.dumps(index))
    refused(weights.parents[1], shard)


def test_image_to_video_weights(weights):
    config = weights.with_name("config.json")
    config.write_text(config.read_text().replace('"in_channels": 16', '"in_channels": 36'))
    refused(weights.parents[1], "out_channels is 16; expected 36")


def test_another_model_and_none_at_all(weights, tmp_path):
    config = weights.with_name("config.json")
    config.write_text(json.dumps({"_class_name": "HunyuanVideoTransformer3DModel"}))
    refused(weights.parents[1], "HunyuanVideoTransformer3DModel", "WanTransformer3DModel")
    config.write_text('{"a":' * 100_000)
    refused(weights.parents[1], f"{config}: JSON nested too deep")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no transformer found", "transformer/config.json")
    refused(tmp_path / "nowhere", "no such directory")


def test_weights_of_another_size_than_the_configuration(weights):
    model = ModelConfig(path=weights.parents[1], dim=1536, ffn_dim=8960, heads=12, layers=30)
    with pytest.raises(
        InputError, match=r"config\.json: the weights have dim 48; expected 1536, the configured model\.dim"
    ):
        load_base(model)


def test_saving_never_overwrites_and_leaves_nothing_half_written(networks, tmp_path, monkeypatch):
    write(networks, tmp_path / "model", "diffusers")
    with pytest.raises(InputError, match="already exists and is not empty"):
        write(networks, tmp_path / "model", "diffusers")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tfm_jax.wan.tensors.os.posix_fallocate", full_disk)
    for layout in ("diffusers", "original"):
        with pytest.raises(OSError, match="No space left"):
            write(networks, tmp_path / "other", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
