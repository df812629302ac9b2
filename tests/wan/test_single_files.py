"""Single files as ComfyUI has them: their dtypes, prefixes and scales, folders of them, and refusals."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from einops import rearrange
from helpers.lora_files import official_file
from helpers.paths import WAN_TINY
from helpers.random_model import random_source
from helpers.wan_reference import SIZES, reference_transformer
from safetensors.torch import load_file, save_file

from tfm_jax.cli.convert import convert
from tfm_jax.config import ModelConfig
from tfm_jax.data.encoding import find_encoders
from tfm_jax.errors import InputError
from tfm_jax.planning.programs import transformer_config
from tfm_jax.sampling.pipeline import check_model
from tfm_jax.wan import load_tokenizer, load_transformer
from tfm_jax.wan.checks import check_source
from tfm_jax.wan.components import TEXT_ENCODER, TRANSFORMER, VAE, abstract_parameters
from tfm_jax.wan.names import transformer_rows
from tfm_jax.wan.saving import save_single_file
from tfm_jax.wan.sources import COMFY_FILES, find_source
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.vae import VaeConfig

CONFIG = SIZES["wide heads"]  # one head of Wan2.1's width, so that the file alone determines the sizes
TEXT = TextEncoderConfig(vocab_size=40, dim=20, heads=2, head_dim=6, ffn_dim=24, layers=2)
TINY_VAE = VaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NUMPY = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The transformer's tensors in float32, with original names."""
    state = reference_transformer(CONFIG).state_dict()
    return {row.original: state[row.diffusers].contiguous() for row in transformer_rows(CONFIG.layers)}


@pytest.fixture(scope="module")
def parameters():
    return abstract_parameters(TRANSFORMER, CONFIG, jnp.float32)


def scaled(tensors: dict[str, torch.Tensor], dtype=E4M3, rest=torch.float16) -> dict[str, torch.Tensor]:
    """Quantise like Comfy-Org: the weights of linear layers in 8 bits with scales, the others in `rest`, a marker."""
    made = {"scaled_fp8": torch.zeros(0, dtype=dtype)}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if tensor.ndim != 2 or module == name or module in ("shared", "token_embedding"):
            made[name] = tensor.to(rest)
            continue
        scale = tensor.abs().max() / torch.finfo(dtype).max
        made |= {name: (tensor / scale).to(dtype), f"{module}.scale_weight": scale, f"{module}.scale_input": scale * 3}
    return made


def numbers(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """What NumPy and ml_dtypes make of a tensor and its scale."""
    tensor, scale = tensors[name], tensors.get(name.removesuffix("weight") + "scale_weight")
    if tensor.dtype not in NUMPY:
        return tensor.float().numpy()
    values = tensor.view(torch.uint8).numpy().view(NUMPY[tensor.dtype]).astype(np.float32)
    return values if scale is None else values * np.float32(scale.item())


def assert_reads(source, tensors: dict[str, torch.Tensor], layout="original") -> None:
    for row in source.component.rows(source.config):
        want = rearrange(numbers(tensors, row.name(layout)), row.axes)
        np.testing.assert_array_equal(source.read(row).astype(np.float32), want, err_msg=row.ours)
        part = tuple(slice(length // 2, length) for length in want.shape)
        np.testing.assert_array_equal(source.read(row, part).astype(np.float32), want[part], err_msg=row.ours)


# --- What files contain ----------------------------------------------------------------------------------------------


STORED = {
    "fp16": ("", lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}),
    "bf16": ("diffusion_model.", lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()}),
    "fp32": ("model.diffusion_model.", lambda tensors: tensors),
    "e4m3": ("", lambda tensors: {name: tensor.to(E4M3) for name, tensor in tensors.items()}),
    "e5m2": ("model.diffusion_model.", lambda tensors: {name: tensor.to(E5M2) for name, tensor in tensors.items()}),
    "scaled": ("", scaled),
    "scaled with prefix": ("diffusion_model.", scaled),
    "scaled e5m2": ("", lambda tensors: scaled(tensors, E5M2, torch.bfloat16)),
    "no scales of inputs": ("", lambda tensors: {n: t for n, t in scaled(tensors).items() if "scale_input" not in n}),
    "no marker": ("", lambda tensors: {name: t for name, t in scaled(tensors).items() if name != "scaled_fp8"}),
    "scales as vectors": ("", lambda tensors: {name: t.reshape(t.shape or 1) for name, t in scaled(tensors).items()}),
}


@pytest.mark.parametrize(("prefix", "change"), STORED.values(), ids=STORED)
def test_every_dtype_and_prefix(tmp_path, tensors, parameters, prefix, change):
    stored, file = change(tensors), tmp_path / "wan.safetensors"
    save_file({prefix + name: tensor for name, tensor in stored.items()}, file)
    source = find_source(file, TRANSFORMER)
    assert source.config == CONFIG
    check_source(source, parameters)
    assert_reads(source, stored)


def test_eight_bits_are_loaded_with_their_scales(tmp_path, tensors):
    stored = scaled(tensors)
    save_file(stored, tmp_path / "wan.safetensors")
    loaded = load_transformer(tmp_path, jnp.float32)
    for name, kernel in (
        ("blocks.0.ffn.0", loaded.blocks.ffn.up.kernel[...][0]),
        ("head.head", loaded.head.kernel[...]),
    ):
        np.testing.assert_array_equal(kernel, numbers(stored, f"{name}.weight").T)
    scale = stored["blocks.0.ffn.0.scale_weight"].item()
    error = np.abs(loaded.blocks.ffn.up.kernel[...][0] - tensors["blocks.0.ffn.0.weight"].numpy().T)
    assert 0 < error.max() <= 16.001 * scale  # half the distance of the largest numbers of 4 + 3 bits


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_text_encoders(tmp_path, names):
    """Comfy-Org's file has the names of transformers, the embedding under two names, and the tokenizer."""
    source = random_source(TEXT_ENCODER, TEXT, np.random.default_rng(0))
    file = tmp_path / "umt5.safetensors"
    save_single_file(source, file, jnp.float32)
    file.with_suffix(".tfm_jax.json").unlink(missing_ok=True)
    written = load_file(file)
    rows = TEXT_ENCODER.rows(TEXT)
    stored = scaled({row.name(names): written[row.diffusers] for row in rows}, rest=torch.float32)
    if names == "diffusers":
        stored["encoder.embed_tokens.weight"] = stored["shared.weight"].clone()
    save_file({**stored, "spiece_model": torch.arange(9, dtype=torch.uint8)}, file)
    found = find_source(tmp_path, TEXT_ENCODER)
    assert (found.config, found.layout) == (TEXT, names)
    check_source(found, abstract_parameters(TEXT_ENCODER, TEXT, jnp.float32))
    assert_reads(found, stored, names)


def test_an_autoencoder_in_bfloat16(tmp_path):
    file = tmp_path / "vae.safetensors"
    save_single_file(random_source(VAE, TINY_VAE, np.random.default_rng(0)), file, jnp.float32)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(stored, file)
    source = find_source(file, VAE)
    assert source.config == TINY_VAE
    assert_reads(source, stored)


# --- Folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The embedded model with a SentencePiece model, as a folder for ComfyUI."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(WAN_TINY, folder / "source")
    (folder / "source" / "tokenizer" / "spiece.model").write_bytes(b"pieces")
    convert(folder / "source", folder / "comfy", "comfy", "bfloat16")
    return folder / "comfy"


def test_the_folder_has_what_comfyui_reads(tiny):
    assert {str(file.relative_to(tiny)) for file in tiny.rglob("*.safetensors")} == set(COMFY_FILES.values())
    stored = {name: load_file(tiny / file) for name, file in COMFY_FILES.items()}
    assert all(name.startswith("model.diffusion_model.") for name in stored["transformer"])
    assert bytes(stored["text_encoder"]["spiece_model"].numpy()) == b"pieces"
    assert {"encoder.conv1.weight", "conv2.bias"} < stored["vae"].keys()
    sidecar = json.loads((tiny / "diffusion_models" / "wan2.1_t2v.tfm_jax.json").read_text())
    assert sidecar == {"heads": 4, "text_len": 64}  # which are not Wan2.1's


@pytest.mark.parametrize("flat", [False, True])
def test_every_program_finds_the_networks(tiny, tmp_path, flat):
    folder = tiny
    if flat:
        folder = tmp_path / "flat"
        folder.mkdir()
        for file in (file for name in COMFY_FILES.values() for file in (tiny / name).parent.iterdir()):
            shutil.copy(file, folder)
        shutil.copytree(tiny / "tokenizer", folder / "google" / "umt5-xxl")
        official_file(folder / "lora.safetensors", layers=1)  # not a network
    model = ModelConfig(path=folder, dim=128, ffn_dim=512, heads=4, layers=8)
    assert len(check_model(model)) == 4  # sampling and training
    assert find_encoders(folder) == find_encoders(WAN_TINY)  # preparation: the fingerprints are the same
    assert transformer_config(model).text_dim == 64  # planning
    assert load_tokenizer(folder)(["a red disc"])[1].sum() > 1


def test_one_file_is_written_and_read(tmp_path, capsys):
    convert(WAN_TINY, tmp_path / "wan.safetensors", "comfy", "float32")
    assert "wan.safetensors: transformer (comfy layout, float32)" in capsys.readouterr().out
    convert(tmp_path / "wan.safetensors", tmp_path / "back", "diffusers", "bfloat16")
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (WAN_TINY / name).read_bytes()
    with pytest.raises(InputError, match=r"wan\.safetensors: already exists"):
        convert(WAN_TINY, tmp_path / "wan.safetensors", "comfy", "float32")


# --- Refusals --------------------------------------------------------------------------------------------------------

Q = "blocks.0.self_attn.q"


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def having(name, value):
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.0.cross_attn.k.bias"), r"1 of 42 tensors are missing, such as blocks\.0\.cross_attn\.k\.bias"),
        (without("blocks.0.ffn.0.weight"), r"blocks\.0\.ffn\.0\.weight has shape \[\]; expected 2 axes"),
        (
            without(f"{Q}.weight"),
            r"no transformer found; expected a safetensors file with blocks\.0\.self_attn\.q\.wei",
        ),
        (
            having("blocks.0.cross_attn.k_img.weight", torch.ones(2)),
            r"1 of 43 tensors do not belong .*'blocks\.0\.cross_attn\.k_img\.weight' in wan.* \(similar names: ",
        ),
        (without(f"{Q}.scale_weight"), rf"{Q}\.weight has 8 bits but no scale; expected {Q}\.scale_weight"),
        (having(f"{Q}.scale_weight", torch.ones(3)), rf"{Q}\.scale_weight has shape \[3\]; expected one number"),
        (having(f"{Q}.scale_weight", torch.tensor(0.0)), rf"{Q}\.scale_weight is 0; expected a positive number"),
        (having(f"{Q}.scale_weight", torch.tensor(torch.nan)), rf"{Q}\.scale_weight is nan; expected a positive"),
        (having("blocks.0.x.scale_weight", torch.tensor(1.0)), r"do not belong to .*'blocks\.0\.x\.scale_weight'"),
        (having(f"{Q}.comfy_quant", torch.ones(2, dtype=torch.uint8)), rf"tensor '{Q}\.comfy_quant' has dtype U8"),
        (having(f"{Q}.weight", torch.ones(128, 64).to(E4M3)), rf"{Q}\.weight has shape \[128, 64\]; expected \[128, 1"),
    ],
)
def test_files_that_are_not_whole(tmp_path, tensors, parameters, change, message):
    file = tmp_path / "wan.safetensors"
    save_file(change(scaled(tensors)), file)
    with pytest.raises(InputError, match=f"^{file}: .*{message}") as caught:
        check_source(find_source(file, TRANSFORMER), parameters)
    assert "\n" not in str(caught.value)


def test_heads_that_nothing_determines(tmp_path):
    convert(WAN_TINY, tmp_path / "wan.safetensors", "comfy", "float32")
    (tmp_path / "wan.tfm_jax.json").write_text('{"heads": 3}')
    with pytest.raises(InputError, match=r"wan\.tfm_jax\.json: heads is 3 for a width of 128; expected an even head"):
        find_source(tmp_path, TRANSFORMER)
    (tmp_path / "wan.tfm_jax.json").unlink()
    assert find_source(tmp_path, TRANSFORMER).config.heads == 1


def test_two_files_with_the_same_network(tmp_path, tensors):
    (tmp_path / "diffusion_models").mkdir()
    for name in ("a.safetensors", "diffusion_models/b.safetensors"):
        save_file(tensors, tmp_path / name)
    message = r"has 2 files with a transformer, a\.safetensors, diffusion_models/b\.safetensors; expected one"
    with pytest.raises(InputError, match=message):
        find_source(tmp_path, TRANSFORMER)
    assert find_source(tmp_path / "a.safetensors", TRANSFORMER).config == CONFIG


def test_one_file_is_not_a_whole_model(tmp_path, tensors):
    file = tmp_path / "wan.safetensors"
    save_file(tensors, file)
    with pytest.raises(
        InputError, match=rf"^{file}: no vae found; expected a safetensors file with decoder\.upsamples"
    ):
        find_source(file, VAE)
    with pytest.raises(InputError, match=rf"^{file}: is one file, without a tokenizer; expected the directory of a wh"):
        load_tokenizer(file)
    (tmp_path / "prompt.txt").write_text("a red disc")
    with pytest.raises(InputError, match=r"prompt\.txt: not a complete safetensors file"):
        find_source(tmp_path / "prompt.txt", TRANSFORMER)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"^{file}: not a complete safetensors file"):
        find_source(file, TRANSFORMER)
