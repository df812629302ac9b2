"""The operations of a program by formula are those of the compiled program."""

import dataclasses
from pathlib import Path

import jax
import pytest
from helpers.paths import ROOT, WAN_TINY

from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.config import LoraConfig, ModelConfig
from tfm_jax.flops import sampling_flops, training_flops, video_flops
from tfm_jax.lora.adapters import adapter_sizes
from tfm_jax.planning import hlo, programs
from tfm_jax.planning.chips import CHIPS
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.planning.roofline import make_roofline
from tfm_jax.sharding import make_mesh
from tfm_jax.wan.attention import chunked


def compile_unoptimized(lowered):
    """Compile without LLVM's optimizations, which are slow and do not change the HLO."""
    return lowered.compile({"xla_backend_optimization_level": 0})


def roofline_of(compiled):
    """Roofline of a program compiled for the CPU, at the rates of another chip."""
    return make_roofline(hlo.Module(compiled.as_text()), CHIPS["v5e"])


def counted_flops(run, rank):
    lora = dataclasses.replace(run.lora, rank=rank)
    model, tokens = programs.transformer_config(run.model), programs.num_tokens(run)
    return training_flops(model, lora, run.train.remat, run.train.batch_size, tokens)


def lora_flops(run):
    """Operations of the adapters in a step: what more a step of twice the rank computes."""
    twice, once = (counted_flops(run, rank) for rank in (2 * run.lora.rank, run.lora.rank))
    return sum(twice) - sum(once)


def attention_flops(run):
    """Operations of attention in a step, without repeated scores: two products forward and four backward. `full`
    repeats the forward pass, and the keys of the text need no gradient without an adapter."""
    model, tokens, repeated = run.model, programs.num_tokens(run), run.train.remat == "full"
    product = 2 * model.dim * tokens
    needed = (6 + 2 * repeated) * (tokens + TEXT_LENGTH)
    if "cross_attn.k" not in adapter_sizes(run.lora):
        needed -= TEXT_LENGTH
    return product * needed * model.layers * run.train.batch_size


ALL = ("q", "k", "v", "o", "ffn.0", "ffn.2")


# Two heads at a time, and two chunks for the 256 tokens: the compiler keeps the loops of attention.
@pytest.mark.parametrize(
    ("remat", "targets"), [("full", ALL), ("attention", ("self_attn.q", "cross_attn.v")), ("none", ALL)]
)
def test_operations_of_a_step_are_those_of_the_compiled_program(tiny_run, remat, targets, monkeypatch):
    monkeypatch.setattr(chunked, "QUERY_CHUNK", 128)
    monkeypatch.setattr(chunked, "SCORES", 2 * 128 * TEXT_LENGTH)
    run = tiny_run(TrainPlan, f"--train.remat={remat}", f"--lora.targets=[{', '.join(targets)}]")
    lowered = programs.lower(run, make_mesh(run.mesh, jax.devices()[:1])).lowered
    counted = training_flops(programs.transformer_config(run.model), run.lora, remat, 2, programs.num_tokens(run))
    found = roofline_of(compile_unoptimized(lowered))
    assert found.flops == sum(counted)
    by_class = {row.name: row.flops for row in found.classes}
    assert by_class["LoRA"] == lora_flops(run)
    assert by_class["attention"] == attention_flops(run) + counted.scores


def test_operations_of_sampling_are_those_of_the_compiled_program(tiny_run):
    run = tiny_run(SamplePlan)
    lowered = programs.lower(run, make_mesh(run.mesh, jax.devices()[:1])).lowered
    counted = sampling_flops(programs.transformer_config(run.model), 1, programs.num_tokens(run), guided=True)
    assert roofline_of(compile_unoptimized(lowered)).flops == counted


def test_steps_without_guidance_take_half(tiny_run):
    run = tiny_run(SamplePlan, "--sampling.steps=10", "--sampling.guidance_interval=[0.2, 0.9]")
    network, tokens = programs.transformer_config(run.model), programs.num_tokens(run)
    once = sampling_flops(network, 1, tokens, guided=False)
    assert video_flops(network, run.sampling, tokens) == (7 * 2 + 3) * once
    assert video_flops(network, dataclasses.replace(run.sampling, guidance=1), tokens) == 10 * once


def test_the_size_of_the_text_is_read_from_the_weights_if_they_exist():
    model = ModelConfig(path=WAN_TINY, dim=128, ffn_dim=512, heads=4, layers=8)
    tiny = programs.transformer_config(model)
    without_weights = programs.transformer_config(dataclasses.replace(model, path=ROOT / "none"))
    assert (tiny.text_dim, tiny.text_len) == (64, 64)
    assert (without_weights.text_dim, without_weights.text_len) == (4096, 512)


def test_operations_of_14b_equal_a_short_formula():
    network = programs.transformer_config(ModelConfig(path=Path(), dim=5120, ffn_dim=13824, heads=40, layers=40))
    counted = training_flops(network, LoraConfig(), "full", 1, 32760)
    weights = 40 * (6 * 5120**2 + 2 * 5120 * 13824)  # linear layers applied to the video
    attention = 40 * 4 * 5120 * 32760 * (32760 + 512)
    assert counted.forward == pytest.approx(2 * 32760 * weights + attention, rel=0.02)
    assert counted.backward == pytest.approx(2 * 32760 * weights + 2 * attention, rel=0.03)
