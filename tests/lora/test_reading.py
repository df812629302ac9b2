"""LoRA files of other programs: every spelling is read, and anything that is not a whole LoRA is refused."""

import json
import re

import pytest
import torch
from helpers.lora_files import DIM, RANK, assert_same_deltas, deltas, make_lora, rewritten
from safetensors.torch import save_file

from tfm_jax.errors import InputError
from tfm_jax.lora.files import read_lora, write_lora


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


def test_reads_differences(tmp_path):
    differences = {
        "diffusion_model.blocks.1.self_attn.q.diff": ("blocks.1.self_attn.q.weight", (DIM, DIM)),
        "diffusion_model.blocks.0.ffn.2.diff_b": ("blocks.0.ffn.2.bias", (DIM,)),
        "diffusion_model.blocks.0.norm3.diff": ("blocks.0.norm3.weight", (DIM,)),
        "diffusion_model.blocks.1.cross_attn.norm_k.diff": ("blocks.1.cross_attn.norm_k.weight", (DIM,)),
        "diffusion_model.blocks.0.diff_m": ("blocks.0.modulation", (1, 6, DIM)),
        "diffusion_model.blocks.1.modulation.diff": ("blocks.1.modulation", (1, 6, DIM)),
        "diffusion_model.head.diff_m": ("head.modulation", (1, 2, DIM)),
        "patch_embedding.diff": ("patch_embedding.weight", (DIM, 4, 1, 2, 2)),
    }
    values = {key: torch.full(shape, number + 1.0) for number, (key, (_, shape)) in enumerate(differences.items())}
    back = read_lora(rewritten(tmp_path / "lora.safetensors", lambda tensors: tensors.update(values)))
    assert back.differences.keys() == {name for name, _ in differences.values()}
    for key, (name, _) in differences.items():
        assert (back.differences[name] == values[key].numpy()).all()
    assert_same_deltas(deltas(back), deltas(make_lora()))


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
def test_several_ranks_and_alphas_become_one(tmp_path, dialect):
    want = deltas(make_lora())

    def respell(tensors):
        for number, linear in enumerate(want):
            module = f"diffusion_model.{linear}" if dialect == "comfy" else f"lora_unet_{linear.kohya}"
            a, b = ("lora_A", "lora_B") if dialect == "comfy" else ("lora_down", "lora_up")
            if number % 3 == 0:  # two copies of the factors, each of which counts half
                tensors[f"{module}.{a}.weight"] = tensors[f"{module}.{a}.weight"].repeat(2, 1) / 2
                tensors[f"{module}.{b}.weight"] = tensors[f"{module}.{b}.weight"].repeat(1, 2)
                tensors[f"{module}.alpha"] = torch.tensor(2.0 * RANK)
            else:
                tensors[f"{module}.{b}.weight"] = tensors[f"{module}.{b}.weight"] * 4
                tensors[f"{module}.alpha"] = torch.tensor(RANK / 4)

    back = read_lora(rewritten(tmp_path / "lora.safetensors", respell, dialect))
    assert (back.rank, back.alpha) == (2 * RANK, 2 * RANK)
    assert_same_deltas(deltas(back), want)


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
            r"recognised 40 of 41 keys, but not 'diffusion_model\.blocks\.0\.cross_attn\.k_img\.lora_A.*'; .*ffn\.2",
        ),
        (set_to(f"{Q}.diff_x", torch.ones(DIM)), "comfy", r"recognised 40 of 41 keys, but not .*diff_x"),
        (set_to(f"{Q}.diff_b", torch.tensor([torch.nan])), "comfy", r"q\.diff_b' is not finite"),
        (
            lambda tensors: tensors.update({f"{Q}.diff_b": torch.ones(DIM), f"{Q[16:]}.diff_b": torch.ones(DIM)}),
            "comfy",
            r"second difference for blocks\.0\.self_attn\.q\.bias",
        ),
        (set_to("text_embedding.0.lora_A.weight", torch.ones(RANK, DIM)), "comfy", "text_embedding.0 has no B factor"),
        (set_to("text_embedding.1.lora_A.weight", torch.ones(RANK, DIM)), "comfy", "not 'text_embedding"),
        (set_to(f"{Q}.dora_scale", torch.ones(DIM)), "comfy", r"q\.dora_scale' belongs to a DoRA whose norms"),
        (set_to(f"{Q}.lora_C.weight", torch.ones(1)), "comfy", rf"not '{Q}\.lora_C.*similar names: {Q}\.lora_"),
        (set_to("diffusion_model.blocks.00.ffn.0.lora_A.weight", torch.ones(1)), "comfy", r"not .*blocks\.00"),
        (
            set_to(f"{KOHYA_Q}_img.alpha", torch.tensor(1.0)),
            "kohya",
            f"recognised 60 of 61 keys, but not '{KOHYA_Q}_img",
        ),
        (lambda tensors: {"model.weight": torch.ones(2)}, "comfy", r"recognised 0 of 1 keys, but not 'model\.weight"),
        (
            lambda tensors: {f"x.{key}": value for key, value in tensors.items()},
            "comfy",
            "recognised 0 of 40 keys, but not 'x.",
        ),
        (
            without(f"{Q}.lora_B.weight"),
            "comfy",
            r"blocks\.0\.self_attn\.q has no B factor, but 19 of 20 modules have both",
        ),
        (
            without(f"{Q}.lora_A.weight"),
            "comfy",
            r"blocks\.0\.self_attn\.q has no A factor, but 19 of 20 modules have both",
        ),
        (
            set_to("blocks.0.self_attn.q.lora_A.weight", torch.ones(RANK, DIM)),
            "comfy",
            r"blocks\.0\.self_attn\.q\.lora_A\.weight' and .* name the same factor",
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
            "recognised 40 of 41 keys",
        ),
        (set_to(f"{Q.replace('0', '1٢')}.lora_A.weight", torch.ones(RANK, DIM)), "comfy", "recognised 40 of 41 keys"),
        (set_to(f"{Q}.lora_A.weight", torch.ones(RANK, DIM, 1)), "comfy", r"has A \[4, 24, 1\]"),
        (set_to(f"{Q}.lora_B.weight", torch.full((DIM, RANK), torch.nan)), "comfy", r"B factor of blocks.*not finite"),
        (
            set_to(f"{Q}.lora_A.weight", torch.ones(RANK, DIM).int()),
            "comfy",
            r"lora_A\.weight' has dtype I32; expected",
        ),
        (set_to(f"{KOHYA_Q}.alpha", torch.tensor(0.0)), "kohya", r"\.alpha of blocks\.0\.self_attn\.q is 0; expected"),
        (set_to(f"{KOHYA_Q}.alpha", torch.tensor(torch.nan)), "kohya", r"\.alpha of blocks\.0\.self_attn\.q is nan"),
        (
            set_to(f"{KOHYA_Q}.alpha", torch.ones(2)),
            "kohya",
            r"\.alpha of blocks\.0\.self_attn\.q has shape \[2\]; expected",
        ),
        (without(f"{KOHYA_Q}.alpha"), "kohya", r"blocks\.0\.self_attn\.q has no \.alpha, but other modules do"),
        (
            lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(".alpha")},
            "kohya",
            r"lora_unet_ keys without \.alpha",
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
    with pytest.raises(InputError, match=r"has \.alpha tensors, but its metadata .* gives alpha 8"):
        read_lora(path)


def test_refuses_what_is_not_a_whole_file(tmp_path):
    path = tmp_path / "lora.safetensors"
    with pytest.raises(InputError, match=r"lora\.safetensors: no such file"):
        read_lora(path)
    write_lora(path, make_lora())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"lora\.safetensors: not a complete safetensors file"):
        read_lora(path)
    path.write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(InputError, match=r"lora\.safetensors: is an HTML page"):
        read_lora(path)
    save_file({}, path)
    with pytest.raises(InputError, match=r"lora\.safetensors: recognised 0 of 0 keys"):
        read_lora(path)
