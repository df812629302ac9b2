"""The operations of a program by formula are those of the compiled program."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import pytest
from helpers.paths import ROOT, WAN_TINY
from helpers.plans import fake_topology, run_14b

from tfm_jax.config import LoraConfig, ModelConfig
from tfm_jax.flops import sampling_flops, training_flops, video_flops
from tfm_jax.planning import hlo, programs
from tfm_jax.planning.plan import flops
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.sharding import make_mesh


def compile_unoptimized(lowered):
    """Compile without LLVM's optimizations, which are slow and do not change the HLO."""
    return lowered.compile({"xla_backend_optimization_level": 0})


def matrix_product_flops(compiled):
    """Operations of all matrix products that one execution of a compiled program computes."""
    module = hlo.Module(compiled.as_text())
    total = 0
    for name, instruction in module.instructions():
        if instruction.op == "dot":
            left = module.computations[name].instructions[instruction.operands[0]].shape
            sizes = [int(n) for n in re.search(r"\[([\d,]*)\]", left)[1].split(",")]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", instruction.attributes)[1].split(",")
            result = hlo.array_bytes(instruction.shape) // 4
            total += module.times[name] * 2 * result * math.prod(sizes[int(axis)] for axis in contracted)
    return total


ALL = ("q", "k", "v", "o", "ffn.0", "ffn.2")


# 256 tokens: two chunks of attention, so that the compiler keeps its loop.
@pytest.mark.parametrize(
    ("remat", "targets"), [("full", ALL), ("attention", ("self_attn.q", "cross_attn.v")), ("none", ALL)]
)
def test_operations_of_a_step_are_those_of_the_compiled_program(tiny_run, remat, targets):
    run = tiny_run(TrainPlan, f"--train.remat={remat}", f"--lora.targets=[{', '.join(targets)}]")
    lowered = programs.lower(run, make_mesh(run.mesh, jax.devices()[:1])).lowered
    counted = training_flops(programs.transformer_config(run.model), run.lora, remat, 2, programs.num_tokens(run))
    assert matrix_product_flops(compile_unoptimized(lowered)) == sum(counted)


def test_operations_of_sampling_are_those_of_the_compiled_program(tiny_run):
    run = tiny_run(SamplePlan)
    lowered = programs.lower(run, make_mesh(run.mesh, jax.devices()[:1])).lowered
    counted = sampling_flops(programs.transformer_config(run.model), 1, programs.num_tokens(run), guided=True)
    assert matrix_product_flops(compile_unoptimized(lowered)) == counted


def test_steps_without_guidance_take_half(tiny_run):
    run = tiny_run(SamplePlan, "--sampling.steps=10", "--sampling.guidance_interval=[0.2, 0.9]")
    network, tokens = programs.transformer_config(run.model), programs.num_tokens(run)
    once = sampling_flops(network, 1, tokens, guided=False)
    assert video_flops(network, run.sampling, tokens) == (7 * 2 + 3) * once
    assert video_flops(network, dataclasses.replace(run.sampling, guidance=1), tokens) == 10 * once


def test_the_text_width_is_read_from_the_weights_if_they_exist():
    model = ModelConfig(path=WAN_TINY, dim=128, ffn_dim=512, heads=4, layers=8)
    assert programs.transformer_config(model).text_dim == 64
    assert programs.transformer_config(dataclasses.replace(model, path=ROOT / "none")).text_dim == 4096


def test_operations_of_14b_equal_a_short_formula():
    network = programs.transformer_config(ModelConfig(path=Path(), dim=5120, ffn_dim=13824, heads=40, layers=40))
    counted = training_flops(network, LoraConfig(), "full", 1, 32760)
    weights = 40 * (6 * 5120**2 + 2 * 5120 * 13824)  # linear layers applied to the video
    attention = 40 * 4 * 5120 * 32760 * (32760 + 512)
    assert counted.forward == pytest.approx(2 * 32760 * weights + attention, rel=0.02)
    assert counted.backward == pytest.approx(2 * 32760 * weights + 2 * attention, rel=0.03)


@pytest.mark.parametrize(
    ("kind", "dtype", "products"), [("v5e", "bfloat16", 3), ("v5e", "float32", 1), ("h100", "bfloat16", 1)]
)
def test_score_products_that_attention_recomputes(kind, dtype, products):
    run = run_14b()
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype=dtype))
    model, tokens = programs.transformer_config(run.model), programs.num_tokens(run)
    once = training_flops(model, run.lora, run.train.remat, 4, tokens).scores
    assert flops(run, fake_topology(kind, 4), 4)["scores"] == products * once
