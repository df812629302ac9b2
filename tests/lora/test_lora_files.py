import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tfm_jax.errors import InputError
from tfm_jax.lora.files import DIALECTS, Adapter, Lora, read_lora, write_lora
from tfm_jax.wan.names import block_linears

LAYERS, DIM, FFN_DIM, RANK = 2, 24, 40, 4
DIFFUSERS_NAMES = {original: diffusers for _, original, diffusers in block_linears()}


def make_lora(alpha: float = RANK, layers: int = LAYERS, targets=tuple(DIFFUSERS_NAMES)) -> Lora:
    rng = np.random.default_rng(layers)
    adapters = {}
    for layer in range(layers):
        for name in targets:
            features_in = FFN_DIM if name == "ffn.2" else DIM
            features_out = FFN_DIM if name == "ffn.0" else DIM
            # As they come from JAX's [in, rank] and [rank, out]: transposed, not contiguous.
            a = rng.normal(0, 0.1, size=(features_in, RANK)).astype(np.float32).T
            b = rng.normal(0, 0.1, size=(RANK, features_out)).astype(np.float32).T
            adapters[f"blocks.{layer}.{name}"] = Adapter(a, b)
    return Lora(adapters, RANK, alpha)


def deltas(lora: Lora) -> dict[str, np.ndarray]:
    """What every linear map gets added, [out, in]."""
    return {name: lora.alpha / lora.rank * adapter.b @ adapter.a for name, adapter in lora.adapters.items()}


def assert_same_deltas(got: dict[str, np.ndarray], want: dict[str, np.ndarray], atol: float = 1e-6) -> None:
    assert list(got) == list(want)
    for name, delta in want.items():
        np.testing.assert_allclose(got[name], delta, rtol=0, atol=atol, err_msg=name)


def file_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


# --- Writing and reading back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_float32_round_trip_is_exact(tmp_path, dialect):
    lora = make_lora()
    write_lora(tmp_path / "new" / "lora.safetensors", lora, dialect, np.float32, {"steps": "7"})
    back = read_lora(tmp_path / "new" / "lora.safetensors")
    assert (back.rank, back.alpha, dict(back.metadata)) == (RANK, RANK, {"steps": "7"})
    assert list(back.adapters) == list(lora.adapters)
    for name, adapter in lora.adapters.items():
        np.testing.assert_array_equal(back.adapters[name].a, adapter.a)
        np.testing.assert_array_equal(back.adapters[name].b, adapter.b)
        assert back.adapters[name].a.dtype == np.float32
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
    want = torch.tensor(np.array(lora.adapters["blocks.1.self_attn.q"].a)).bfloat16()
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


def test_kohya_needs_every_map(tmp_path):
    lora = make_lora(targets=[name for name in DIFFUSERS_NAMES if name != "cross_attn.k"])
    with pytest.raises(InputError, match=r"blocks\.0\.cross_attn\.k .*lora\.targets: \[q, k, v, o, ffn\.0, ffn\.2\]"):
        write_lora(tmp_path / "lora.safetensors", lora, "kohya")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"old")
    lora = make_lora()
    lora.adapters["blocks.1.ffn.0"].b[0, 0] = 1e6
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.0\.lora_B\.weight would not be finite in float16"):
        write_lora(path, lora, dtype=np.float16)
    with pytest.raises(TypeError):
        write_lora(path, lora, metadata={"steps": 7})  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="a directory"):
        write_lora(tmp_path, lora)


# --- The same file in diffusers --------------------------------------------------------------------------------------


def wan_pipeline() -> WanPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=DIM // 2, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=FFN_DIM, num_layers=LAYERS,
    )  # fmt: skip
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


@pytest.fixture
def warned(caplog):
    """All that diffusers logs and all that anything warns of."""
    diffusers_logging.enable_propagation()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught] + [record.getMessage() for record in caplog.records]
    diffusers_logging.disable_propagation()


@pytest.mark.parametrize("dialect", ["comfy", "diffusers", "kohya"])
@pytest.mark.parametrize("alpha", [RANK, 1.0, 10.5])
def test_diffusers_loads_every_module_with_its_scale(tmp_path, dialect, alpha, warned):
    lora = make_lora(alpha)
    write_lora(tmp_path / "lora.safetensors", lora, dialect, np.float32, {"steps": "7"})
    pipeline = wan_pipeline()
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    assert not warned()

    layers = {name: m for name, m in pipeline.transformer.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == len(lora.adapters)
    assert all((layer.lora_B["default_0"].weight != 0).all() for layer in layers.values())
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.transformer.state_dict()
    assert after.keys() == before.keys()
    for name, delta in deltas(lora).items():
        _, layer, original = name.split(".", 2)
        weight = f"blocks.{layer}.{DIFFUSERS_NAMES[original]}.weight"
        got = (after.pop(weight) - before[weight]).numpy()
        np.testing.assert_allclose(got, delta, rtol=0, atol=1e-6, err_msg=name)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]), name


def test_diffusers_loads_some_of_the_maps(tmp_path, warned):
    lora = make_lora(8.0, targets=["self_attn.q", "ffn.2"])
    for dialect in ("comfy", "diffusers"):
        write_lora(tmp_path / "lora.safetensors", lora, dialect)
        pipeline = wan_pipeline()
        pipeline.load_lora_weights(tmp_path / "lora.safetensors")
        layers = [name for name, m in pipeline.transformer.named_modules() if isinstance(m, LoraLayer)]
        assert layers == ["blocks.0.attn1.to_q", "blocks.0.ffn.net.2", "blocks.1.attn1.to_q", "blocks.1.ffn.net.2"]
    assert not warned()


def test_diffusers_ignores_diffsynth(tmp_path, warned):
    """Why `comfy` is the default. It also shows that the tests above would see a warning."""
    write_lora(tmp_path / "lora.safetensors", make_lora(), "diffsynth")
    pipeline = wan_pipeline()
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    assert not any(isinstance(module, LoraLayer) for module in pipeline.transformer.modules())
    assert any("No LoRA keys" in message for message in warned())


@pytest.mark.parametrize("how", ["pipeline", "transformer", "peft"])
def test_reads_what_diffusers_and_peft_write(tmp_path, how):
    lora = make_lora(10.0)
    write_lora(tmp_path / "ours.safetensors", lora, "diffusers", np.float32)
    pipeline = wan_pipeline()
    if how == "peft":
        config = LoraConfig(r=RANK, lora_alpha=10, target_modules=list(DIFFUSERS_NAMES.values()))
        model = get_peft_model(pipeline.transformer, config)
        state = load_file(tmp_path / "ours.safetensors")
        state = {re.sub("^transformer", "base_model.model", key): value for key, value in state.items()}
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = state.pop(name.replace(".default", ""))
        assert not state
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
    else:
        pipeline.load_lora_weights(tmp_path / "ours.safetensors", adapter_name="default")
        path = tmp_path / "pytorch_lora_weights.safetensors"
        if how == "transformer":
            pipeline.transformer.save_lora_adapter(tmp_path)
        else:
            metadata = pipeline.transformer.peft_config["default"].to_dict()
            state = {
                key.replace(".default", ""): value
                for key, value in pipeline.transformer.state_dict().items()
                if ".lora_" in key
            }
            WanPipeline.save_lora_weights(tmp_path, state, transformer_lora_adapter_metadata=metadata)
    back = read_lora(path)
    assert back.alpha == 10.0
    assert_same_deltas(deltas(back), deltas(lora))


# --- Files of others -------------------------------------------------------------------------------------------------


def rewritten(path: Path, change, dialect="comfy", alpha: float = RANK, metadata=None) -> Path:
    """A file of `dialect` whose tensors `change` has edited, in place or by returning others."""
    write_lora(path, make_lora(alpha), dialect, np.float32)
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("dialect", "old", "new"),
    [
        ("diffsynth", r"\.default", ""),
        ("diffsynth", "^", "pipe.dit."),
        ("diffsynth", "^", "base_model.model."),
        ("comfy", r"\.weight", ".default.weight"),
        ("comfy", "^diffusion_model", "transformer"),
        ("diffusers", r"^transformer\.", ""),
        ("diffusers", r"^transformer\.", "base_model.model."),
        ("diffusers", "^transformer", "diffusion_model"),
    ],
)
def test_reads_other_spellings(tmp_path, dialect, old, new):
    def respell(tensors):
        return {re.sub(old, new, key): value for key, value in tensors.items()}

    back = read_lora(rewritten(tmp_path / "lora.safetensors", respell, dialect))
    assert back.alpha == RANK
    assert_same_deltas(deltas(back), deltas(make_lora()))


def test_reads_lora_down_lora_up_and_alpha_with_dots(tmp_path):
    def respell(tensors):
        new = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in tensors.items()}
        alphas = {k.replace("lora_A.weight", "alpha"): torch.tensor(6.0) for k in tensors if "lora_A" in k}
        return new | alphas

    back = read_lora(rewritten(tmp_path / "lora.safetensors", respell))
    assert back.alpha == 6
    assert_same_deltas(deltas(back), deltas(make_lora(6)))


Q = "diffusion_model.blocks.0.self_attn.q"
KOHYA_Q = "lora_unet_blocks_0_self_attn_q"


def set_to(key, value):
    return lambda tensors: tensors.update({key: value})


def without(*keys):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


ADAPTER = {"transformer.r": RANK, "transformer.lora_alpha": 8}


@pytest.mark.parametrize(
    ("change", "dialect", "message"),
    [
        (
            set_to("diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", torch.ones(RANK, DIM)),
            "comfy",
            r"matched 40 of 41 keys, not 'diffusion_model\.blocks\.0\.cross_attn\.k_img\.lora_A\.weight'; .*ffn\.2",
        ),
        (set_to(f"{Q}.diff_b", torch.ones(DIM)), "comfy", r"matched 40 of 41 keys, not .*diff_b"),
        (set_to("text_embedding.0.lora_A.weight", torch.ones(RANK, DIM)), "comfy", "not 'text_embedding"),
        (set_to("diffusion_model.blocks.00.ffn.0.lora_A.weight", torch.ones(1)), "comfy", r"not .*blocks\.00"),
        (set_to(f"{KOHYA_Q}_img.alpha", torch.tensor(1.0)), "kohya", f"matched 60 of 61 keys, not '{KOHYA_Q}_img"),
        (lambda tensors: {"model.weight": torch.ones(2)}, "comfy", r"matched 0 of 1 keys, not 'model\.weight"),
        (
            lambda tensors: {f"x.{key}": value for key, value in tensors.items()},
            "comfy",
            "matched 0 of 40 keys, not 'x.",
        ),
        (without(f"{Q}.lora_B.weight"), "comfy", r"blocks\.0\.self_attn\.q has no B factor, matched 19 of 20 modules"),
        (without(f"{Q}.lora_A.weight"), "comfy", r"blocks\.0\.self_attn\.q has no A factor, matched 19 of 20 modules"),
        (
            set_to("blocks.0.self_attn.q.lora_A.weight", torch.ones(RANK, DIM)),
            "comfy",
            r"blocks\.0\.self_attn\.q\.lora_A\.weight' and .* are the same factor",
        ),
        (
            lambda tensors: tensors.update(
                {f"{Q}.lora_A.weight": torch.ones(3, DIM), f"{Q}.lora_B.weight": torch.ones(DIM, 3)}
            ),
            "comfy",
            r"blocks\.0\.self_attn\.q has rank 3, blocks\.0\.self_attn\.k has 4; expected the same",
        ),
        (set_to(f"{Q}.lora_B.weight", torch.ones(DIM, 3)), "comfy", r"self_attn\.q has A \[4, 24\] and B \[24, 3\]"),
        (
            set_to(f"{Q.replace('0', '1')}.lora_A.weight", torch.ones(RANK, DIM + 2)),
            "comfy",
            r"A of blocks\.1\.self_attn\.q is \[4, 26\]; expected \[4, 24\], as in blocks\.0\.self_attn\.q",
        ),
        (
            set_to(f"{Q.replace('0', '9' * 5000)}.lora_A.weight", torch.ones(RANK, DIM)),
            "comfy",
            "matched 40 of 41 keys",
        ),
        (set_to(f"{Q.replace('0', '1٢')}.lora_A.weight", torch.ones(RANK, DIM)), "comfy", "matched 40 of 41 keys"),
        (set_to(f"{Q}.lora_A.weight", torch.ones(RANK, DIM, 1)), "comfy", r"has A \[4, 24, 1\]"),
        (set_to(f"{Q}.lora_B.weight", torch.full((DIM, RANK), torch.nan)), "comfy", r"B factor of blocks.*not finite"),
        (set_to(f"{Q}.lora_A.weight", torch.ones(RANK, DIM).int()), "comfy", r"lora_A\.weight' is I32; expected"),
        (
            set_to(f"{KOHYA_Q}.alpha", torch.tensor(2.0)),
            "kohya",
            r"self_attn\.q has alpha 2, blocks.*k has 4; expected",
        ),
        (set_to(f"{KOHYA_Q}.alpha", torch.tensor(0.0)), "kohya", r"\.alpha of blocks\.0\.self_attn\.q is 0; expected"),
        (set_to(f"{KOHYA_Q}.alpha", torch.tensor(torch.nan)), "kohya", r"\.alpha of blocks\.0\.self_attn\.q is nan"),
        (set_to(f"{KOHYA_Q}.alpha", torch.ones(2)), "kohya", r"\.alpha of blocks\.0\.self_attn\.q is \[2\]; expected"),
        (without(f"{KOHYA_Q}.alpha"), "kohya", r"blocks\.0\.self_attn\.q has no \.alpha, other modules do"),
        (
            lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(".alpha")},
            "kohya",
            r"no \.alpha beside",
        ),
    ],
)
def test_refuses_tensors(tmp_path, change, dialect, message):
    path = rewritten(tmp_path / "bad.safetensors", change, dialect)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{message}") as caught:
        read_lora(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list; expected an object"),
        ('{"a":' * 100_000, "JSON nested too deep"),
        ('{"r": 4, "r": 4, "lora_alpha": 8}', "not JSON .key 'r' is given twice"),
        ('{"r": 4, "lora_alpha": NaN}', "not JSON .'NaN' is not a finite number"),
        ('{"r": 4, "lora_alpha": 1%s}' % ("0" * 400), "lora_alpha is 10+\\.\\.\\.0+; expected"),
        ('{"r": 4.0, "lora_alpha": 8}', r"r is 4\.0; expected a valid integer"),
        ('{"lora_alpha": 8}', "r is missing"),
        (json.dumps(ADAPTER | {"transformer.r": 8}), "r is 8; expected 4"),
        (json.dumps(ADAPTER | {"transformer.lora_alpha": "8"}), "lora_alpha is '8'; expected a valid number"),
        (json.dumps(ADAPTER | {"transformer.use_rslora": True}), "use_rslora is True; expected a plain LoRA"),
        (json.dumps(ADAPTER | {"transformer.alpha_pattern": {"ffn": 2}}), "alpha_pattern is"),
    ],
)
def test_refuses_metadata(tmp_path, text, message):
    path = rewritten(tmp_path / "bad.safetensors", dict, "diffusers", metadata={"lora_adapter_metadata": text})
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: metadata lora_adapter_metadata: {message}"):
        read_lora(path)


def test_refuses_two_alphas(tmp_path):
    path = rewritten(tmp_path / "bad.safetensors", dict, "kohya", 4, {"lora_adapter_metadata": json.dumps(ADAPTER)})
    with pytest.raises(InputError, match=r"has \.alpha tensors, and alpha 8 in its metadata"):
        read_lora(path)


def test_refuses_what_is_not_a_whole_file(tmp_path):
    path = tmp_path / "lora.safetensors"
    with pytest.raises(InputError, match=r"lora\.safetensors: no such file"):
        read_lora(path)
    write_lora(path, make_lora())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"lora\.safetensors: not a whole safetensors file"):
        read_lora(path)
    path.write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(InputError, match=r"lora\.safetensors: an HTML page"):
        read_lora(path)
    save_file({}, path)
    with pytest.raises(InputError, match=r"lora\.safetensors: matched 0 of 0 keys"):
        read_lora(path)
