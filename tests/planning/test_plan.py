"""Plans of small programs that are compiled for TPUs, and how plans are described and saved."""

import dataclasses
import json

import jax
import pytest
from helpers.plans import fake_plan

from tfm_jax import errors
from tfm_jax.config import MeshConfig
from tfm_jax.errors import CompilerError
from tfm_jax.planning import programs
from tfm_jax.planning.chips import GIB, find_topology
from tfm_jax.planning.plan import Plan, describe, make_plan, out_of_memory_sizes
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.sharding import make_mesh


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


def test_a_plan_survives_json():
    assert Plan.from_json(json.loads(json.dumps(fake_plan().as_json()))) == fake_plan()


def test_a_step_is_compiled_for_tpus(tiny_run):
    where = find_topology("v5e:2x2")
    sizes = ["--model.dim=256", "--model.ffn_dim=512", "--model.dtype=bfloat16"]  # TPUs pad smaller weights
    run = tiny_run(TrainPlan, "--mesh.fsdp=2", "--mesh.sequence=2", *sizes)
    found = make_plan(run, where)
    assert found.fits
    assert (found.chips, found.mesh["fsdp"], found.mesh["sequence"]) == (4, 2, 2)
    assert found.collectives["all-gather"].bytes > 0
    assert found.collectives["all-to-all"].times >= 3 * 4 * 2
    assert found.uncounted_loops == 0
    products = {row.name: row.flops for row in found.roofline.classes}
    # The kernels of attention pad the 512 tokens of the text and the 832 of the video to whole blocks.
    assert sum(products.values()) == pytest.approx(sum(found.flops.values()) / 4, rel=0.25)
    assert 0 < products["LoRA"] < products["linear layers"]
    assert products["attention"] > 0
    assert not found.roofline.unknown
    less_split = dataclasses.replace(run, mesh=MeshConfig(data=2, sequence=2))
    _, arguments = programs.lower(less_split, make_mesh(less_split.mesh, where.devices))
    assert found.arguments < arguments


def test_sampling_is_compiled_for_tpus(tiny_run):
    found = make_plan(tiny_run(SamplePlan, "--mesh.fsdp=2"), find_topology("v5e:2x2"))
    assert found.fits
    assert found.clips == 4
    assert found.program == "sampling step"


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
