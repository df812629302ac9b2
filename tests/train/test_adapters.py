"""Adapters: how they start, which layers have one, and what they do in PyTorch after an export."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx
from helpers.training_runs import CONFIG
from helpers.wan_reference import inputs, relative, run_reference

from tfm_jax.checkpoint import flatten
from tfm_jax.config import LoraConfig
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import (
    adapter_sizes,
    attach_lora,
    check_lora,
    init_lora,
    load_adapters,
    lora_from_checkpoint,
    split_lora,
    target_linears,
)
from tfm_jax.lora.files import Adapter, Lora, read_lora, write_lora
from tfm_jax.wan import load_transformer
from tfm_jax.wan.components import TRANSFORMER, abstract_model
from tfm_jax.wan.names import BLOCK_LINEARS, BlockLinear
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer

LORA = LoraConfig(rank=4, alpha=6)
run = jax.jit(WanTransformer.__call__)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_new_adapters_leave_every_bit_of_the_output(model_folder, dtype):
    batch = inputs(CONFIG, 1, 3, 4, 6)
    model = load_transformer(model_folder, dtype)
    before = np.asarray(run(model, **batch))
    attach_lora(model, LORA)
    init_lora(model, jax.random.key(0))
    assert float(jnp.abs(model.blocks.ffn.up.lora_a[...]).max()) > 0
    assert (np.asarray(run(model, **batch)) == before).all()


def test_a_factors_start_as_in_peft(model_folder):
    model = load_transformer(model_folder, jnp.float32)
    attach_lora(model, LoraConfig(rank=32))
    init_lora(model, jax.random.key(0))
    for linear in (model.blocks.self_attn.q, model.blocks.ffn.down):
        a = np.asarray(linear.lora_a[...])
        bound = a.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt 5
        assert np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert not np.asarray(linear.lora_b[...]).any()
    assert (np.asarray(model.blocks.self_attn.q.lora_a[...]) != np.asarray(model.blocks.self_attn.k.lora_a[...])).any()


@pytest.mark.parametrize(
    ("config", "modules", "parameters"),
    [
        (TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40), 400, 153_354_240),
        (TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=30), 300, 43_745_280),
    ],
)
def test_trainable_parameters_of_the_published_models(config, modules, parameters):
    model = abstract_model(TRANSFORMER, config, jnp.bfloat16)
    attach_lora(model, LoraConfig())
    lora = split_lora(model).lora
    leaves = jax.tree.leaves(lora)
    assert sum(leaf.shape[0] for leaf in leaves) == 2 * modules
    assert sum(leaf.size for leaf in leaves) == parameters
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_targets_are_found_by_the_end_of_their_name():
    everything = target_linears(LoraConfig().targets)
    assert len(everything) == 10
    assert everything[-2:] == ["ffn.0", "ffn.2"]
    assert target_linears(("self_attn.q", "o")) == ["self_attn.q", "self_attn.o", "cross_attn.o"]
    with pytest.raises(InputError, match=r"lora\.targets: 'attn' names no linear layer; expected some of q, k, v, o"):
        target_linears(("q", "attn"))


def test_rank_above_the_width_is_refused(model_folder):
    model = abstract_model(TRANSFORMER, CONFIG, jnp.float32)
    with pytest.raises(InputError, match=r"lora\.rank=97: expected at most 96, the width of self_attn\.q"):
        attach_lora(model, LoraConfig(rank=97))


def test_sizes_follow_the_targets():
    config = LoraConfig(rank=8, alpha=4, ranks={"ffn.0": 16, "self_attn.q": 2}, targets=("q", "ffn.0", "ffn.2"))
    ranks = {"self_attn.q": 2, "cross_attn.q": 8, "ffn.0": 16, "ffn.2": 8}
    assert adapter_sizes(config) == {name: (rank, 4.0) for name, rank in ranks.items()}
    stabilised = adapter_sizes(dataclasses.replace(config, rslora=True))
    assert stabilised == {name: (rank, 4 * rank**0.5) for name, rank in ranks.items()}


def test_scales_are_those_of_peft():
    """peft selects modules by the end of their name, too."""
    modules = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("to_q", "to_k", "up")})
    theirs = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"to_k": 2, "up": 8}, target_modules=list(modules)
    )
    peft.inject_adapter_in_model(theirs, modules)
    ours = adapter_sizes(LoraConfig(rank=4, alpha=6, rslora=True, ranks={"k": 2, "ffn.0": 8}))
    for name, module in (("self_attn.q", "to_q"), ("self_attn.k", "to_k"), ("ffn.0", "up")):
        assert ours[name].rank == modules[module].r["default"]
        assert ours[name].alpha / ours[name].rank == pytest.approx(modules[module].scaling["default"])


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"x": 2}, "lora.ranks: 'x' names no linear layer"),
        ({"k": 2}, r"lora.ranks: lora.targets=\[q, v\] does not select k; expected it there"),
        (
            {"q": 2, "self_attn.q": 4},
            "lora.ranks: q and self_attn.q both select self_attn.q; expected only one of them",
        ),
    ],
)
def test_ranks_that_select_nothing_or_too_much_are_refused(ranks, message):
    with pytest.raises(InputError, match=message):
        adapter_sizes(LoraConfig(ranks=ranks, targets=("q", "v")))


MIXED = LoraConfig(rank=4, alpha=6, rslora=True, ranks={"k": 2, "ffn.0": 8})


@pytest.mark.parametrize(
    ("dialect", "config"),
    [("comfy", LORA), ("diffusers", LORA), ("kohya", LORA), ("comfy", MIXED), ("diffusers", MIXED), ("kohya", MIXED)],
)
def test_exported_adapters_do_in_pytorch_what_they_do_here(model_folder, tmp_path, dialect, config):
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    model = load_transformer(model_folder, jnp.float32)
    attach_lora(model, config)
    init_lora(model, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.1, split_lora(model).lora)
    nnx.update(model, lora)
    batch = inputs(CONFIG, 1, 3, 4, 6)
    ours = run(model, **batch)
    file = tmp_path / "lora.safetensors"
    write_lora(file, lora_from_checkpoint(flatten(lora), config), dialect, np.dtype(np.float32), {})

    reference = WanTransformer3DModel.from_pretrained(model_folder / "transformer").eval()
    plain = run_reference(reference, batch)
    state, metadata = WanLoraLoaderMixin.lora_state_dict(file, return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, reference, metadata=metadata)
    matched = [m for m in reference.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(matched) == 10 * CONFIG.layers
    theirs = run_reference(reference, batch)
    assert relative(ours, theirs) <= 1e-5
    assert relative(plain, theirs) > 1e-2  # the adapters do something

    again = load_transformer(model_folder, jnp.float32)
    load_adapters(again, read_lora(file))
    assert relative(run(again, **batch), theirs) <= 1e-5


# --- Starting from a file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["diffsynth", "comfy"])
def test_training_starts_from_the_adapters_of_a_file(tmp_path, dialect):
    """The official TFM release writes diffsynth files."""
    model = abstract_model(TRANSFORMER, CONFIG, jnp.float32)
    lora = read_lora(write_random_lora(tmp_path, dialect))
    check_lora(lora, LoraConfig(rank=4, alpha=4))
    load_adapters(model, lora)
    for layer in range(CONFIG.layers):
        linear = model.blocks.cross_attn.v
        a, b = lora.adapters[BlockLinear(layer, "cross_attn.v")]
        np.testing.assert_array_equal(linear.lora_a[...][layer], a.T)
        np.testing.assert_array_equal(linear.lora_b[...][layer], b.T)
    assert linear.lora_scale == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(rank=8, alpha=8), "the LoRA has rank 4; the configuration gives self_attn.q rank 8"),
        (
            LoraConfig(rank=4, alpha=4, ranks={"v": 2}),
            "the LoRA has rank 4; the configuration gives self_attn.v rank 2",
        ),
        (LoraConfig(rank=4, alpha=8), r"the LoRA has the scale alpha / rank = 4 / 4; the configuration gives 8 / 4"),
        (LoraConfig(rank=4, alpha=4, rslora=True), "the LoRA has the scale alpha / rank = 4 / 4; .* gives 8 / 4"),
        (
            LoraConfig(rank=4, alpha=4, targets=("q",)),
            "the LoRA has adapters on cross_attn.k, .*selects cross_attn.q, ",
        ),
    ],
)
def test_a_file_that_the_configuration_does_not_describe_is_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        check_lora(read_lora(write_random_lora(tmp_path)), config)


def write_random_lora(folder, dialect="comfy"):
    rng = np.random.default_rng(0)
    adapters = {}
    for layer in range(CONFIG.layers):
        for name in BLOCK_LINEARS:
            features_in = CONFIG.ffn_dim if name == "ffn.2" else CONFIG.dim
            features_out = CONFIG.ffn_dim if name == "ffn.0" else CONFIG.dim
            a, b = (rng.standard_normal(shape, np.float32) for shape in ((4, features_in), (features_out, 4)))
            adapters[BlockLinear(layer, name)] = Adapter(a, b)
    write_lora(folder / "lora.safetensors", Lora(adapters, 4, 4.0), dialect, np.float32)
    return folder / "lora.safetensors"
