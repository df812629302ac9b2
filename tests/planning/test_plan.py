"""Plans of small programs that are compiled for TPUs, and how plans are described and saved."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from helpers.plans import fake_plan

from tfm_jax import errors
from tfm_jax.config import MeshConfig
from tfm_jax.errors import CompilerError
from tfm_jax.planning import programs
from tfm_jax.planning.chips import GIB, find_topology
from tfm_jax.planning.plan import Phase, Plan, describe, make_plan, out_of_memory_sizes
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.sharding import make_mesh
from tfm_jax.wan.components import TEXT_ENCODER, VAE, abstract_parameters
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.vae import VaeConfig


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.28G) "
            "exceeds available HBM (15.75G).",
            (round(20.28 * GIB), round(15.75 * GIB)),
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 1.50T of "
         "95.74G hbm. Exceeded hbm capacity by 1.41T.", (1536 * GIB, round(95.74 * GIB))),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None),
    ],
)  # fmt: skip
def test_sizes_are_read_from_out_of_memory_errors(message, sizes):
    assert out_of_memory_sizes(message) == sizes


def test_a_plan_that_does_not_fit_is_described_with_the_bytes_over():
    text = describe(fake_plan(needed=20 * GIB, temporaries=None, code=None, collectives=None))
    assert f"DOES NOT FIT: {round(4.25 * GIB):,} bytes (4.25 GiB) over" in text
    assert "compiled, not run" in text
    assert "unknown" in text


def test_a_plan_that_fits_is_described_with_the_bytes_to_spare():
    text = describe(fake_plan(program="sampling step", remat=None, flops={"forward": 10**15}))
    assert "fits, 5.75 GiB to spare" in text
    assert "data=1 fsdp=4 sequence=2 tensor=1; 4 clips of 32,760 tokens" in text


def sampling_plan() -> Plan:
    """A run of 50 steps, which fits but for the text encoder."""
    return fake_plan(
        program="sampling step", remat=None, flops={"forward": 10**15}, needed=16 * GIB, steps=50,
        networks={"transformer": 3 * GIB, "text encoder": 11 * GIB, "autoencoder": GIB},
        phases={"encoding": Phase(12 * GIB, 4 * GIB), "denoising": Phase(4 * GIB, 6 * GIB)},
        flops_per_video=197 * 10**15,
    )  # fmt: skip


def test_a_sampling_run_is_described_with_its_networks_and_phases():
    text = describe(sampling_plan())
    assert "weights   transformer 3.00 GiB, text encoder 11.00 GiB, autoencoder 1.00 GiB" in text
    assert "phases    encoding 16.00 GiB, denoising 10.00 GiB" in text
    assert "the run needs 16.00 GiB of 15.75 GiB" in text
    assert "DOES NOT FIT: 268,435,456 bytes (0.25 GiB) over" in text
    assert "1.97e+17 per video of 50 steps: 125 s at the peak rate, a lower bound" in text


def test_a_plan_survives_json():
    for plan in (fake_plan(), sampling_plan()):
        assert Plan.from_json(json.loads(json.dumps(plan.as_json()))) == plan


def test_a_step_is_compiled_for_tpus(tiny_run):
    where = find_topology("v6e:2x2")
    sizes = ["--model.dim=256", "--model.ffn_dim=512", "--model.dtype=bfloat16"]  # TPUs pad smaller weights
    run = tiny_run(TrainPlan, "--mesh.fsdp=2", "--mesh.sequence=2", *sizes)
    found = make_plan(run, where)
    assert found.fits
    assert (found.chips, found.mesh["fsdp"], found.mesh["sequence"]) == (4, 2, 2)
    assert found.collectives["all-gather"].bytes > 0
    assert found.collectives["all-to-all"].times >= 3 * 4 * 2
    assert found.uncounted_loops == 0
    products = {row.name: row.flops for row in found.roofline.classes}
    # Each of the devices along `sequence` computes the keys and values of the whole text, which is long here.
    assert sum(products.values()) == pytest.approx(sum(found.flops.values()) / 4, rel=0.3)
    assert products["attention"] == 9 * found.flops["scores"] / 4  # 2 products forward, repeated; 4 and 1 backward
    assert 0 < products["LoRA"] < products["linear layers"]
    assert products["attention"] > 0
    assert not found.roofline.unknown
    # Without the options of `sharding.compiler_options`, a v6e waits for all of its weights.
    weights = [row for row in found.roofline.collectives if row.name.startswith("all-gather: squeeze")]
    assert weights
    assert all(row.hidden > 0 for row in weights)
    less_split = dataclasses.replace(run, mesh=MeshConfig(data=2, sequence=2))
    assert found.arguments < programs.lower(less_split, make_mesh(less_split.mesh, where.devices)).arguments


def test_sampling_is_compiled_for_tpus(tiny_run, monkeypatch):
    """The text encoder is split like the transformer, and freed before it is loaded; the autoencoder stays."""
    small = {TEXT_ENCODER: ENCODER, VAE: DECODER}  # the real networks take minutes to compile
    monkeypatch.setattr(programs, "_config_of_weights", lambda _, component: small.get(component))
    run = tiny_run(SamplePlan, "--mesh.fsdp=2")
    found = make_plan(run, find_topology("v5e:2x2"))
    assert found.fits
    assert (found.clips, found.program, found.steps) == (4, "sampling step", 3)
    transformer, encoder, vae = found.networks.values()
    assert vae == size_of(VAE, DECODER)
    assert size_of(TEXT_ENCODER, ENCODER) / 2 <= encoder < 0.6 * size_of(TEXT_ENCODER, ENCODER)
    assert found.phases["encoding"].weights == encoder + vae
    assert found.phases["denoising"].weights == found.phases["decoding"].weights == transformer + vae
    assert found.needed == max(phase.needed for phase in found.phases.values())
    assert found.phases["decoding"].rest > 2 * 32 * 32 * 3 * 4  # the frames of one call
    assert found.flops_per_video == 3 * found.flops["forward"] // 4


ENCODER = TextEncoderConfig(vocab_size=256, dim=64, heads=4, head_dim=16, ffn_dim=128, layers=2)
DECODER = VaeConfig(base_dim=8, dim_mult=(1, 1), num_res_blocks=0, temporal_downsample=(True,))


def size_of(component, config) -> int:
    """Bytes of a network in float32."""
    parameters = abstract_parameters(component, config, jnp.float32)
    return sum(4 * math.prod(x.shape) for x in parameters.values())


def test_a_program_refused_for_less_than_the_rounding_does_not_fit(tiny_run, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("total memory (15.75G) exceeds available HBM (15.75G)")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    found = make_plan(tiny_run(TrainPlan, "--mesh.sequence=2", "--mesh.fsdp=2"), find_topology("v5e:2x2"))
    assert not found.fits
    assert found.over == 1


def test_a_failure_of_the_compiler_is_reported(tiny_run, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: no\nway")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(CompilerError) as caught:
        make_plan(tiny_run(TrainPlan, "--mesh.sequence=2", "--mesh.fsdp=2"), find_topology("v5e:2x2"))
    assert errors.describe(caught.value) == ("the compiler failed: INTERNAL: no way", 3)


def test_training_is_planned_for_the_largest_size_of_clips(tiny_run):
    sizes = "--clip.buckets=[[17, 32, 64], [9, 96, 64], [17, 48, 48]]"
    assert programs.latent_shape(tiny_run(TrainPlan, sizes))[:3] == (3, 12, 8)
    alone = programs.latent_shape(tiny_run(TrainPlan))
    assert programs.latent_shape(tiny_run(SamplePlan, sizes, "--sampling.output=x")) == alone
