"""DoRA: its training compared with PEFT, its files compared with diffusers, and where it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import WanPipeline
from flax import nnx
from helpers.lora_files import rewritten
from helpers.wan_reference import SIZES, inputs, reference_transformer, relative, run_reference

from tfm_jax.checkpoint import flatten
from tfm_jax.config import LoraConfig, ModelConfig, OptimizerConfig
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import (
    attach_lora,
    check_lora,
    init_lora,
    load_adapters,
    lora_from_checkpoint,
    split_lora,
    without_lora,
)
from tfm_jax.lora.combining import parse_choice, read_loras
from tfm_jax.lora.files import read_lora, write_lora
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.wan import load_base
from tfm_jax.wan.layers import Linear
from tfm_jax.wan.names import BlockLinear
from tfm_jax.wan.transformer import WanTransformer

DORA = LoraConfig(rank=4, alpha=6, dora=True)
CONFIG = SIZES["small"]
BATCH = inputs(CONFIG, 1, 2, 4, 6)
PARTS = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_magnitude": "lora_magnitude_vector"}

run = jax.jit(WanTransformer.__call__)


# --- Training --------------------------------------------------------------------------------------------------------


def torch_step(values, kernel, bias, x, weights, optimizer_config):
    """Output, gradients and new parameters of one step of peft + torch's AdamW, in our axes."""
    linear = torch.nn.Linear(*kernel.shape)
    linear.weight.data, linear.bias.data = torch.from_numpy(kernel.T.copy()), torch.from_numpy(bias.copy())
    module = torch.nn.ModuleDict({"linear": linear})
    config = peft.LoraConfig(r=DORA.rank, lora_alpha=DORA.alpha, use_dora=True, target_modules=["linear"])
    peft.inject_adapter_in_model(config, module)
    parameters = {ours: getattr(module["linear"], theirs)["default"].weight for ours, theirs in PARTS.items()}
    for name, parameter in parameters.items():
        parameter.data = torch.from_numpy(values[name].T.copy())
    groups = [
        {"params": [parameter], "weight_decay": 0.0 if name == "lora_magnitude" else optimizer_config.weight_decay}
        for name, parameter in parameters.items()
    ]
    optimizer = torch.optim.AdamW(groups, optimizer_config.learning_rate)
    output = module["linear"](torch.from_numpy(x))
    (output * torch.from_numpy(weights)).sum().backward()
    gradients = {name: parameter.grad.numpy().T.copy() for name, parameter in parameters.items()}
    optimizer.step()
    return output.detach().numpy(), gradients, {name: p.detach().numpy().T for name, p in parameters.items()}


def test_a_training_step_is_that_of_peft():
    rng = np.random.default_rng(0)
    linear = Linear(12, 8, rngs=nnx.Rngs(0))
    kernel, bias, x, weights = (rng.normal(size=s).astype(np.float32) for s in ((12, 8), (8,), (5, 12), (5, 8)))
    linear.kernel.set_value(jnp.asarray(kernel))
    linear.bias.set_value(jnp.asarray(bias))
    shapes = {"lora_a": (12, 4), "lora_b": (4, 8), "lora_magnitude": (8,)}
    values = {name: rng.uniform(0.5, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in values.items():
        setattr(linear, name, nnx.LoRAParam(jnp.asarray(value), axes=(None,) * value.ndim))
    linear.lora_scale = DORA.alpha / DORA.rank
    graph, adapter, frozen = nnx.split(linear, nnx.LoRAParam, ...)

    def loss(adapter):
        output = nnx.merge(graph, adapter, frozen)(jnp.asarray(x))
        return jnp.sum(output * weights), output

    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2)
    optimizer = make_optimizer(config, 1)
    (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
    updates, _ = optimizer.update(gradient, optimizer.init(adapter), adapter)
    after = jax.tree.map(jnp.add, adapter, updates)

    their_output, their_gradients, their_values = torch_step(values, kernel, bias, x, weights, config)
    assert relative(output, their_output) <= 1e-5
    for name in PARTS:
        assert relative(gradient[name][...], their_gradients[name]) <= 1e-5, name
        assert relative(after[name][...], their_values[name]) <= 1e-5, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    reference_transformer(CONFIG).save_pretrained(folder / "model" / "transformer")
    return folder


def base(folder, name="model"):
    return load_base(ModelConfig(path=folder / name, dtype="float32", dim=48, ffn_dim=80, heads=2, layers=2))


@pytest.fixture(scope="module")
def trained(folder):
    """A model with the adapters of a DoRA that are away from their start, and the file of these adapters."""
    model = base(folder)
    attach_lora(model, DORA)
    init_lora(model, jax.random.key(0))
    new = np.asarray(run(model, **BATCH))
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), split_lora(model).lora)
    nnx.update(model, lora)
    write_lora(folder / "dora.safetensors", lora_from_checkpoint(flatten(lora), DORA), "diffusers", np.float32)
    return model, new


def test_new_adapters_change_nothing(folder, trained):
    model, new = trained
    plain = np.asarray(run(base(folder), **BATCH))
    assert relative(new, plain) <= 1e-6
    assert relative(run(without_lora(model), **BATCH), plain) <= 1e-6
    assert relative(run(model, **BATCH), plain) > 1e-2


# --- Files -----------------------------------------------------------------------------------------------------------


def test_diffusers_does_what_was_trained(folder, trained):
    model, _ = trained
    pipeline = WanPipeline(None, None, None, None, transformer=reference_transformer(CONFIG))
    pipeline.load_lora_weights(folder / "dora.safetensors")
    assert relative(run(model, **BATCH), run_reference(pipeline.transformer, BATCH)) <= 1e-5


def test_reading_and_merging_do_what_was_trained(call, folder, trained, tmp_path):
    model, _ = trained
    ours = run(model, **BATCH)
    file = folder / "dora.safetensors"
    again = base(folder)
    lora = read_lora(file)
    check_lora(lora, DORA)
    load_adapters(again, lora)
    assert relative(run(again, **BATCH), ours) <= 1e-6

    outcome = call("lora", "merge", f"--model={folder}/model", f"--lora={file}", tmp_path / "new", "--dtype=float32")
    assert outcome.code == 0, outcome.err
    assert relative(run(base(tmp_path, "new"), **BATCH), ours) <= 1e-5


def test_peft_writes_what_we_read(folder, trained, tmp_path):
    pipeline = WanPipeline(None, None, None, None, transformer=reference_transformer(CONFIG))
    pipeline.load_lora_weights(folder / "dora.safetensors", adapter_name="default")
    pipeline.transformer.save_lora_adapter(tmp_path)
    want, got = read_lora(folder / "dora.safetensors"), read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert (got.alpha, got.rank, got.magnitudes.keys()) == (want.alpha, want.rank, want.adapters.keys())
    for linear, magnitude in want.magnitudes.items():
        np.testing.assert_array_equal(got.magnitudes[linear], magnitude)


def test_converted_magnitudes_keep_all_their_digits(call, folder, trained, tmp_path):
    outcome = call(
        "lora", "convert", folder / "dora.safetensors", tmp_path / "x", "--dialect=diffusers", "--dtype=bfloat16"
    )
    assert outcome.code == 0, outcome.err
    q = BlockLinear(1, "self_attn.q")
    want = read_lora(folder / "dora.safetensors").magnitudes[q]
    np.testing.assert_array_equal(read_lora(tmp_path / "x").magnitudes[q], want)
    outcome = call("lora", "inspect", tmp_path / "x")
    assert "dialect diffusers (for diffusers), bfloat16, rank 4" in outcome.out
    assert "a DoRA" in outcome.out


@pytest.mark.parametrize("dialect", ["comfy", "diffsynth", "kohya"])
def test_a_dialect_without_dora_is_refused(call, folder, trained, tmp_path, dialect):
    outcome = call("lora", "convert", folder / "dora.safetensors", tmp_path / "x", f"--dialect={dialect}")
    assert (outcome.code, list(tmp_path.iterdir())) == (2, [])
    assert f"load dialect {dialect} do not apply a DoRA as it was trained; choose dialect diffusers" in outcome.err


def test_sums_and_strengths_are_refused(folder, trained):
    file = folder / "dora.safetensors"
    assert read_loras([parse_choice(file)]).magnitudes
    for choices in ([f"{file}:0.5"], [file, file]):
        with pytest.raises(InputError, match=r"dora\.safetensors: is a DoRA, which has no sum with others; expected"):
            read_loras([parse_choice(choice) for choice in choices])


def test_a_start_of_the_other_kind_is_refused(folder, trained):
    lora = read_lora(folder / "dora.safetensors")
    with pytest.raises(InputError, match=r"the LoRA is a DoRA; expected lora\.dora=true"):
        check_lora(lora, LoraConfig(rank=4, alpha=6))
    with pytest.raises(InputError, match=r"the LoRA is no DoRA; expected lora\.dora=false"):
        check_lora(lora._replace(magnitudes={}), DORA)


Q = "transformer.blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (
            {f"{Q}.lora_magnitude_vector": torch.ones(24)},
            None,
            r"self_attn\.k has no magnitude, but other modules do",
        ),
        ({f"{Q}.lora_magnitude_vector": torch.ones(23)}, None, r"has shape \[23\] or .*; expected 24 finite numbers"),
        ({f"{Q}.lora_magnitude_vector": torch.full((24,), torch.nan)}, None, "a value that is not finite; expected 24"),
        (
            {},
            '{"r": 4, "lora_alpha": 4, "use_dora": true}',
            "use_dora is True; expected False, because the file has",
        ),
    ],
)
def test_an_incomplete_dora_is_refused(tmp_path, change, metadata, message):
    metadata = metadata and {"lora_adapter_metadata": metadata}
    file = rewritten(tmp_path / "x", lambda tensors: tensors.update(change), "diffusers", metadata=metadata)
    with pytest.raises(InputError, match=message):
        read_lora(file)
