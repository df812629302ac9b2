"""LoRAs in models: several with strengths, differences, merged weights and extracted LoRAs, compared with diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from helpers.lora_files import assert_same_deltas, deltas, random_differences, random_lora
from helpers.wan_reference import SIZES, inputs, reference_transformer, relative, run_reference, write_original
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from tfm_jax.config import ModelConfig
from tfm_jax.lora.adapters import load_adapters
from tfm_jax.lora.applying import weight_change
from tfm_jax.lora.combining import combine, parse_choice, read_loras
from tfm_jax.lora.extracting import factorise
from tfm_jax.lora.files import read_lora, write_lora
from tfm_jax.lora.keys import DIALECTS
from tfm_jax.wan import load_base
from tfm_jax.wan.names import OUTER_LINEARS, transformer_rows
from tfm_jax.wan.transformer import WanTransformer

CONFIG = SIZES["small"]
OUTER = ("text_embedding.0", "time_embedding.2", "time_projection.1", "head.head")
DIFFERENCES = (
    "blocks.0.norm3.weight", "blocks.1.norm3.bias", "blocks.1.self_attn.norm_q.weight", "blocks.0.self_attn.q.bias",
    "blocks.1.modulation", "blocks.1.ffn.0.weight", "head.modulation", "head.head.bias", "patch_embedding.weight",
)  # fmt: skip
DIFFUSERS = {row.original: row.diffusers for row in transformer_rows(CONFIG.layers)}
BATCH = inputs(CONFIG, 1, 2, 4, 6)

run = jax.jit(WanTransformer.__call__)


def pipeline(transformer: torch.nn.Module) -> WanPipeline:
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in two layouts, and LoRA files: a (rank 4), b (rank 7, also outside the blocks) and c (differences)."""
    folder = tmp_path_factory.mktemp("models")
    reference = reference_transformer(CONFIG)
    reference.save_pretrained(folder / "diffusers" / "transformer")
    write_original(reference, CONFIG, folder / "original")
    write_lora(folder / "a.safetensors", random_lora(CONFIG, 4, 6.0), "diffsynth", np.float32)
    write_lora(folder / "b.safetensors", random_lora(CONFIG, 7, 7.0, OUTER, seed=1), "comfy", np.float32)
    lora = random_lora(CONFIG, 5, 5.0, OUTER, seed=2)._replace(differences=random_differences(CONFIG, DIFFERENCES))
    write_lora(folder / "c.safetensors", lora, "comfy", np.float32)
    return folder


@pytest.fixture(scope="module")
def velocity(folder):
    """Our velocity with LoRAs, such as velocity("a.safetensors:0.7")."""

    def compute(*choices: str) -> np.ndarray:
        lora = read_loras([parse_choice(folder / choice) for choice in choices])
        model = ModelConfig(path=folder / "diffusers", dtype="float32", dim=48, ffn_dim=80, heads=2, layers=2)
        transformer = load_base(model, change=weight_change(lora._replace(adapters={})))
        load_adapters(transformer, lora)
        return np.asarray(run(transformer, **BATCH))

    return compute


def with_loras(folder, *choices: str) -> torch.nn.Module:
    """Load LoRAs for ComfyUI or diffusers with diffusers, and set their strengths with PEFT."""
    pipe = pipeline(reference_transformer(CONFIG))
    strengths = {}
    for choice in map(parse_choice, choices):
        name = f"lora{len(strengths)}"
        pipe.load_lora_weights(folder / choice.file, adapter_name=name)
        strengths[name] = choice.strength
    pipe.set_adapters(list(strengths), list(strengths.values()))
    return pipe.transformer


def changed_reference(lora) -> torch.nn.Module:
    """Add what a LoRA says, tensor by tensor, to the weights of the reference."""
    reference = reference_transformer(CONFIG)
    tensors = reference.state_dict()
    for linear, delta in deltas(lora).items():
        tensors[f"{linear.diffusers}.weight"] += torch.from_numpy(delta)
    for name, difference in lora.differences.items():
        tensors[DIFFUSERS[name]] += torch.from_numpy(difference)
    return reference


# --- Loading ---------------------------------------------------------------------------------------------------------


def test_every_dialect_in_diffusers_does_what_it_does_here(call, folder, velocity, tmp_path):
    ours = velocity("a.safetensors")
    plain = run_reference(reference_transformer(CONFIG), BATCH)
    for dialect in ("comfy", "diffusers", "kohya"):
        file = tmp_path / f"{dialect}.safetensors"
        assert call("lora", "convert", folder / "a.safetensors", file, f"--dialect={dialect}").code == 0
        theirs = with_loras(tmp_path, file.name)
        assert sum(isinstance(module, LoraLayer) for module in theirs.modules()) == 20
        assert relative(ours, run_reference(theirs, BATCH)) <= 1e-5
    assert relative(ours, plain) > 1e-2


def test_strengths_of_several_loras_are_those_of_set_adapters(call, folder, velocity, tmp_path):
    """Ranks 4 and 7; the second also has adapters outside the blocks."""
    call("lora", "convert", folder / "a.safetensors", tmp_path / "a.safetensors")
    call("lora", "convert", folder / "b.safetensors", tmp_path / "b.safetensors", "--dialect=diffusers")
    theirs = with_loras(tmp_path, "a.safetensors:0.7", "b.safetensors:-0.4")
    ours = velocity("a.safetensors:0.7", "b.safetensors:-0.4")
    assert relative(ours, run_reference(theirs, BATCH)) <= 1e-5
    assert relative(ours, run_reference(with_loras(tmp_path, "a.safetensors"), BATCH)) > 1e-2


def test_the_sum_of_two_loras_is_the_sum_of_their_changes(folder):
    a, b, c = (read_lora(folder / f"{name}.safetensors") for name in "abc")
    combined = combine([(a, parse_choice("a:2")), (b, parse_choice("b")), (c, parse_choice("c:0.5"))])
    assert combined.rank == 16
    parts = [(deltas(a), 2), (deltas(b), 1), (deltas(c), 0.5)]
    want = {linear: sum(part.get(linear, 0) * strength for part, strength in parts) for linear in combined.adapters}
    assert want.keys() == c.adapters.keys()
    assert_same_deltas(deltas(combined), want)
    for name, difference in combined.differences.items():
        np.testing.assert_allclose(difference, c.differences[name] * 0.5)
    assert combine([(a, parse_choice("a"))]) is a


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [("a.st", "a.st", 1), ("x/a.st:0.7", "x/a.st", 0.7), ("a.st:-1", "a.st", -1), ("a:b.st", "a:b.st", 1)],
)
def test_choices(text, file, strength):
    choice = parse_choice(text)
    assert (str(choice.file), choice.strength) == (file, strength)


def test_differences_are_applied(folder, velocity):
    reference = changed_reference(read_lora(folder / "c.safetensors"))
    assert relative(velocity("c.safetensors"), run_reference(reference, BATCH)) <= 1e-5
    without = changed_reference(read_lora(folder / "c.safetensors")._replace(differences={}))
    assert relative(velocity("c.safetensors"), run_reference(without, BATCH)) > 1e-2


def test_differences_are_kept_only_for_comfy(call, folder, tmp_path):
    outcome = call("lora", "convert", folder / "c.safetensors", tmp_path / "comfy")
    assert outcome.out == f"{tmp_path}/comfy: 24 adapters and 9 differences (comfy, float32)\n"
    assert load_file(tmp_path / "comfy").keys() == load_file(folder / "c.safetensors").keys()
    assert "differences of 9 whole tensors" in call("lora", "inspect", tmp_path / "comfy").out
    for dialect in DIALECTS:
        if dialect != "comfy":
            outcome = call("lora", "convert", folder / "c.safetensors", tmp_path / "new", f"--dialect={dialect}")
            assert outcome.code == 2
            assert (
                "only dialect comfy stores differences of whole tensors, such as blocks.0.norm3.weight" in outcome.err
            )
    outcome = call("lora", "convert", folder / "b.safetensors", tmp_path / "new", "--dialect=kohya")
    assert "dialect kohya has no adapter on text_embedding.0" in outcome.err
    assert not (tmp_path / "new").exists()


# --- ComfyUI, which is not installed here ----------------------------------------------------------------------------


def comfy_changes(file) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Apply ComfyUI's rule: which keys it looks for in a file, and what they add to which tensor.

    Returns:
        The changes, and the keys that it does not use.
    """
    names = {}
    for row in transformer_rows(CONFIG.layers):
        module = row.original.removesuffix(".weight")
        if module != row.original:
            names[f"lora_unet_{module.replace('.', '_')}"] = row.original
        names[f"diffusion_model.{module}"] = row.original
    tensors, changes = load_file(file), {}
    for module, name in names.items():
        if f"{module}.diff" in tensors:
            changes[name] = tensors.pop(f"{module}.diff")
        if f"{module}.diff_b" in tensors:
            changes[f"{name.removesuffix('.weight')}.bias"] = tensors.pop(f"{module}.diff_b")
        for down, up in (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")):
            if f"{module}.{down}" in tensors:
                a, b = tensors.pop(f"{module}.{down}"), tensors.pop(f"{module}.{up}")
                alpha = tensors.pop(f"{module}.alpha", None)
                changes[name] = b @ a * (1 if alpha is None else alpha / len(a))
    return changes, set(tensors)


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
def test_comfyui_finds_every_module(call, folder, tmp_path, dialect):
    call("lora", "convert", folder / "a.safetensors", tmp_path / "x.safetensors", f"--dialect={dialect}")
    found, unused = comfy_changes(tmp_path / "x.safetensors")
    want = deltas(read_lora(folder / "a.safetensors"))
    assert not unused
    assert found.keys() == {f"{linear}.weight" for linear in want}
    for linear, delta in want.items():
        np.testing.assert_allclose(found[f"{linear}.weight"], delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dialect", ["diffsynth", "diffusers"])
def test_comfyui_finds_nothing_in_the_other_dialects(call, folder, tmp_path, dialect):
    call("lora", "convert", folder / "a.safetensors", tmp_path / "x.safetensors", f"--dialect={dialect}")
    found, unused = comfy_changes(tmp_path / "x.safetensors")
    assert (found, len(unused)) == ({}, 40)


def test_comfyui_finds_every_difference(call, folder, tmp_path):
    call("lora", "convert", folder / "c.safetensors", tmp_path / "x.safetensors")
    found, unused = comfy_changes(tmp_path / "x.safetensors")
    assert not unused
    for name, difference in read_lora(folder / "c.safetensors").differences.items():
        if name != "blocks.1.ffn.0.weight":  # has an adapter too
            np.testing.assert_array_equal(found[name], difference)


# --- Merging and extracting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "original", "tfm_jax", "comfy"])
@pytest.mark.parametrize("base", ["diffusers", "original"])
def test_merged_weights_give_what_base_and_loras_give(call, folder, tmp_path, base, layout):
    loras = f"--lora=[{folder}/a.safetensors:0.7, {folder}/c.safetensors]"
    target = tmp_path / ("model.safetensors" if layout == "comfy" else "merged")
    options = [f"--to={layout}", "--dtype=float32"]
    outcome = call("lora", "merge", f"--model={folder / base}", loras, target, *options)
    assert outcome.code == 0, outcome.err
    if layout == "tfm_jax":
        assert call("convert_weights", target, tmp_path / "again", "--to=diffusers", "--dtype=float32").code == 0
        target = tmp_path / "again"
    if layout in ("diffusers", "tfm_jax"):
        merged = WanTransformer3DModel.from_pretrained(target / "transformer")
    else:
        file = target if layout == "comfy" else target / "diffusion_pytorch_model.safetensors"
        keys = load_file(file).keys()
        assert all(key.startswith("model.diffusion_model.") == (layout == "comfy") for key in keys)
        config = str(folder / "diffusers" / "transformer")
        merged = WanTransformer3DModel.from_single_file(file, config=config, torch_dtype=torch.float32)
    choices = [parse_choice(f"{folder}/a.safetensors:0.7"), parse_choice(f"{folder}/c.safetensors")]
    want = changed_reference(read_loras(choices))
    assert relative(run_reference(merged, BATCH), run_reference(want, BATCH)) <= 1e-5


def test_merging_refuses_what_does_not_fit(call, folder, tmp_path):
    wide = tmp_path / "wide.safetensors"
    write_lora(wide, random_lora(SIZES["many heads"], 4, 4.0))
    base = ("lora", "merge", f"--model={folder}/diffusers")
    for arguments, words in (
        (
            (f"--lora={wide}", tmp_path / "new"),
            f"--lora={wide}: LoRA has an adapter for a layer that the model lacks",
        ),
        ((f"--lora={folder}/a.safetensors:x", tmp_path / "new"), "a.safetensors:x: no such file"),
        (
            (f"--lora=[{folder}/a.safetensors, {wide}]", tmp_path / "new"),
            "the widths of blocks.0.self_attn.q",
        ),
        ((f"--lora={folder}/a.safetensors", folder), "not empty"),
        ((f"--lora={folder}/a.safetensors", wide, "--to=comfy"), "already exists"),
    ):
        outcome = call(*base, *arguments)
        assert outcome.code == 2, outcome
        assert words in outcome.err, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["wide.safetensors"]


def test_extracting_finds_the_merged_lora_again(call, folder, tmp_path):
    lora = f"--lora={folder}/c.safetensors"
    call("lora", "merge", f"--model={folder}/diffusers", lora, tmp_path / "tuned", "--to=original", "--dtype=float32")
    arguments = (folder / "diffusers", tmp_path / "tuned", tmp_path / "x.safetensors", "--dtype=float32")
    outcome = call("lora", "extract", *arguments, "--rank=48")
    assert outcome.code == 0, outcome.err
    assert "24 adapters and 8 differences of other tensors (comfy, float32)" in outcome.out
    assert "100.00% on average" in outcome.out
    want, got = read_lora(folder / "c.safetensors"), read_lora(tmp_path / "x.safetensors")
    changes = deltas(want)
    for linear in changes:
        changes[linear] = changes[linear] + want.differences.get(f"{linear}.weight", 0)
    assert got.adapters.keys() == want.adapters.keys()
    for linear, delta in deltas(got).items():
        np.testing.assert_allclose(delta, changes[linear], rtol=0, atol=2e-6, err_msg=str(linear))
    for name, difference in got.differences.items():
        np.testing.assert_allclose(difference, want.differences[name], rtol=0, atol=1e-6)

    same = call("lora", "extract", folder / "diffusers", folder / "original", tmp_path / "y", "--rank=4")
    assert (same.code, "no linear layer differs" in same.err) == (2, True)


def test_factors_hold_the_largest_singular_values():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 60)))[0] for n in (120, 80))
    values = 0.9 ** np.arange(60)
    matrix = (left * values @ right.T).astype(np.float32)
    adapter, share = factorise(matrix, 8, rng)
    assert (adapter.a.shape, adapter.b.shape) == ((8, 80), (120, 8))
    best = left[:, :8] * values[:8] @ right[:, :8].T
    np.testing.assert_allclose(adapter.b @ adapter.a, best, rtol=0, atol=2e-3)
    assert share == pytest.approx(np.sum(values[:8] ** 2) / np.sum(values**2), rel=1e-4)


def test_every_outer_linear_layer_can_have_an_adapter(folder, tmp_path):
    lora = random_lora(CONFIG, 3, 3.0, tuple(OUTER_LINEARS))
    for dialect in ("comfy", "diffsynth", "diffusers"):
        write_lora(tmp_path / dialect, lora, dialect, np.float32)
        assert_same_deltas(deltas(read_lora(tmp_path / dialect)), deltas(lora))
    for dialect in ("comfy", "diffusers"):
        write_lora(tmp_path / "x.safetensors", lora, dialect, np.float32)
        theirs = with_loras(tmp_path, "x.safetensors")
        assert relative(run_reference(theirs, BATCH), run_reference(changed_reference(lora), BATCH)) <= 1e-5


def test_weights_in_bfloat16_are_rounded_after_the_difference_is_added(folder):
    model = ModelConfig(path=folder / "original", dtype="bfloat16", dim=48, ffn_dim=80, heads=2, layers=2)
    lora = read_lora(folder / "c.safetensors")
    plain, changed = load_base(model), load_base(model, change=weight_change(lora._replace(adapters={})))
    row = next(row for row in transformer_rows(2) if row.original == "blocks.1.ffn.0.weight")
    before = reference_transformer(CONFIG).state_dict()[row.diffusers].numpy()
    want = jnp.asarray(before + lora.differences[row.original], jnp.bfloat16).T
    assert (changed.blocks.ffn.up.kernel[...][1] == want).all()
    assert (changed.blocks.ffn.up.kernel[...][0] == plain.blocks.ffn.up.kernel[...][0]).all()
