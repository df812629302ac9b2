"""diffusers loads the files that we write, and we load the files that diffusers and PEFT write."""

import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from helpers.lora_files import DIM, FFN_DIM, LAYERS, RANK, assert_same_deltas, deltas, make_lora
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from tfm_jax.lora.files import read_lora, write_lora
from tfm_jax.wan.names import BLOCK_LINEARS


def wan_pipeline() -> WanPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=DIM // 2, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=FFN_DIM, num_layers=LAYERS,
    )  # fmt: skip
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


@pytest.fixture
def warned(caplog):
    """Collects everything that diffusers logs and every Python warning."""
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
    for linear, delta in deltas(lora).items():
        weight = f"{linear.diffusers}.weight"
        got = (after.pop(weight) - before[weight]).numpy()
        np.testing.assert_allclose(got, delta, rtol=0, atol=1e-6, err_msg=weight)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]), name


def test_diffusers_loads_adapters_on_some_linear_layers(tmp_path, warned):
    lora = make_lora(8.0, targets=["self_attn.q", "ffn.2"])
    for dialect in ("comfy", "diffusers"):
        write_lora(tmp_path / "lora.safetensors", lora, dialect)
        pipeline = wan_pipeline()
        pipeline.load_lora_weights(tmp_path / "lora.safetensors")
        layers = [name for name, m in pipeline.transformer.named_modules() if isinstance(m, LoraLayer)]
        assert layers == ["blocks.0.attn1.to_q", "blocks.0.ffn.net.2", "blocks.1.attn1.to_q", "blocks.1.ffn.net.2"]
    assert not warned()


def test_diffusers_ignores_diffsynth(tmp_path, warned):
    """This is why `comfy` is the default. It also shows that the tests above would notice a warning."""
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
        config = LoraConfig(r=RANK, lora_alpha=10, target_modules=[names.diffusers for names in BLOCK_LINEARS.values()])
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
