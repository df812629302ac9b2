"""The plan of a run on a machine that is not there: its formulas, how it reads compiled programs, and what it says."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import virtual_devices
from helpers.configured import configured
from helpers.paths import ROOT, WAN_TINY

from tfm_jax import errors
from tfm_jax.config import LoraConfig, MeshConfig, ModelConfig, load
from tfm_jax.errors import CompilerError, InputError
from tfm_jax.planning import chips, hlo, programs, scaling
from tfm_jax.planning import search as searching
from tfm_jax.planning.chips import CHIPS, GIB, Topology, topology
from tfm_jax.planning.flops import sampling_flops, training_flops
from tfm_jax.planning.hlo import Traffic
from tfm_jax.planning.plan import Plan, describe, flops, make_plan, too_large
from tfm_jax.planning.programs import SamplePlan, TrainPlan
from tfm_jax.planning.search import candidates, search
from tfm_jax.sharding import make_mesh

TINY = """\
model: {path: none, dim: 64, ffn_dim: 160, heads: 2, layers: 3, dtype: float32}
clip: {frames: 13, height: 128, width: 128}
objective: {kind: fm}
train: {output: none, steps: 1, batch_size: 2}
lora: {rank: 4}
sampling: {output: none, steps: 3}
"""


@pytest.fixture
def parsed(tmp_path):
    """A run of the tiny model."""
    (tmp_path / "tiny.yaml").write_text(TINY)

    def parsed(kind, *fields):
        return configured(kind, ["--config", str(tmp_path / "tiny.yaml"), *fields])

    return parsed


def products(compiled):
    """Operations of the matrix products in a compiled program, as often as they run."""
    module = hlo.Module(compiled.as_text())
    total = 0
    for name, instruction in module.instructions():
        if instruction.op == "dot":
            left = module.computations[name].instructions[instruction.operands[0]].shape
            sizes = [int(n) for n in re.search(r"\[([\d,]*)\]", left)[1].split(",")]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", instruction.rest)[1].split(",")
            result = hlo.array_bytes(instruction.shape) // 4
            total += module.times[name] * 2 * result * math.prod(sizes[int(axis)] for axis in contracted)
    return total


ALL = ("q", "k", "v", "o", "ffn.0", "ffn.2")


# 256 tokens: two chunks of attention, as a loop that the compiler keeps.
@pytest.mark.parametrize(
    ("remat", "targets"), [("full", ALL), ("attention", ("self_attn.q", "cross_attn.v")), ("none", ALL)]
)
def test_operations_of_a_step_are_those_of_the_compiled_program(parsed, remat, targets):
    run = parsed(TrainPlan, f"--train.remat={remat}", f"--lora.targets=[{', '.join(targets)}]")
    lowered, _ = programs.lower(run, make_mesh(run.mesh, jax.devices()[:1]))
    counted = training_flops(programs.network(run.model), run.lora, remat, 2, programs.tokens(run))
    assert products(lowered.compile()) == sum(counted)


def test_operations_of_sampling_are_those_of_the_compiled_program(parsed):
    run = parsed(SamplePlan)
    lowered, _ = programs.lower(run, make_mesh(run.mesh, jax.devices()[:1]))
    counted = sampling_flops(programs.network(run.model), 1, programs.tokens(run), guided=True)
    assert products(lowered.compile()) == counted


def test_the_width_of_text_is_that_of_the_weights_if_they_are_here():
    model = ModelConfig(path=WAN_TINY, dim=128, ffn_dim=512, heads=4, layers=8)
    assert programs.network(model).text_dim == 64
    assert programs.network(dataclasses.replace(model, path=ROOT / "none")).text_dim == 4096


def test_operations_of_14b_by_hand():
    network = programs.network(ModelConfig(path=Path(), dim=5120, ffn_dim=13824, heads=40, layers=40))
    counted = training_flops(network, LoraConfig(), "full", 1, 32760)
    weights = 40 * (6 * 5120**2 + 2 * 5120 * 13824)  # that see the video
    attention = 40 * 4 * 5120 * 32760 * (32760 + 512)
    assert counted.forward == pytest.approx(2 * 32760 * weights + attention, rel=0.02)
    assert counted.backward == pytest.approx(2 * 32760 * weights + 2 * attention, rel=0.03)


# Every kind of collective, once outside and once in a loop of 5 turns; all over groups of 4 of the 8 devices.
COLLECTIVES = r"""
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

def all_kinds(x):  # [8, 64] on each device: 2048 bytes
    x = jax.lax.all_to_all(x, "b", 0, 1, tiled=True)  # [2, 256]
    x = jax.lax.ppermute(jnp.sin(x), "b", [(0, 1), (1, 2), (2, 3), (3, 0)])
    whole = jax.lax.all_gather(jnp.cos(x), "b")  # [4, 2, 256]
    part = jax.lax.psum_scatter(jnp.sin(whole), "b", scatter_dimension=0)  # [2, 256]
    return jax.lax.psum(jnp.cos(part), "b").reshape(8, 64)

@jax.jit
@jax.shard_map(mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False)
def program(x):
    x = all_kinds(x)
    return jax.lax.scan(lambda x, _: (all_kinds(x), None), x, length=5)[0]

print(program.lower(jax.ShapeDtypeStruct((16, 256), jnp.float32)).compile().as_text())
"""


@pytest.fixture(scope="module")
def program_of_collectives():
    command = [sys.executable, "-c", COLLECTIVES]
    env = virtual_devices.environment(8)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("known", [True, False])
def test_collectives_are_counted_by_kind_bytes_and_turns(program_of_collectives, known):
    text = program_of_collectives
    assert "known_trip_count" in text
    found = hlo.collectives(hlo.Module(text if known else text.replace("known_trip_count", "unknown")))
    block = 2048
    assert found.uncounted_loops == 0
    assert found.kinds == {
        "all-gather": Traffic(6, 6 * 3 * block),
        "all-reduce": Traffic(6, 6 * 2 * block * 3 // 4),
        "reduce-scatter": Traffic(6, 6 * 3 * block),
        "all-to-all": Traffic(6, 6 * block * 3 // 4),
        "collective-permute": Traffic(6, 6 * block),
    }


# As TPU programs have them, cut down: a loop unrolled twice, whose counter goes to 4 in steps of 2, with a permutation
# that starts and ends; a gather in three fusions; a scatter by the name of its computation.
TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%cond (p.1: (u32[], bf16[32,640])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4)
  %p.1 = (u32[]{:T(128)}, bf16[32,640]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter.1, %limit), direction=LT
}

%body (p.2: (u32[], bf16[32,640])) -> (u32[], bf16[32,640]) {
  %two = u32[]{:T(128)} constant(2)
  %p.2 = (u32[]{:T(128)}, /*index=1*/bf16[32,640]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=0
  %block = bf16[32,640]{1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=1
  %start = (bf16[32,640]{1,0}, bf16[32,640]{1,0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%block), source_target_pairs={{0,1},{1,0}}
  %next = u32[]{:T(128)} add(%counter.2, %two)
  %done = bf16[32,640]{1,0:T(8,128)(2,1)} collective-permute-done(%start)
  ROOT %both = (u32[]{:T(128)}, bf16[32,640]{1,0:T(8,128)(2,1)}) tuple(%next, %done)
}

%starts (q.1: bf16[1,640]) -> (bf16[1,640], bf16[8,640]) {
  %q.1 = bf16[1,640]{1,0} parameter(0)
  %gather.1 = bf16[8,640]{1,0} all-gather(%q.1), replica_groups=mesh['x'=4,'y'=2] {'x','y'}, frontend_attributes={chain_id="0"}
  ROOT %call.1 = (bf16[1,640]{1,0}, bf16[8,640]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%ends (q.2: bf16[1,640]) -> bf16[8,640] {
  %q.2 = bf16[1,640]{1,0} parameter(0)
  %gather.2 = bf16[8,640]{1,0} all-gather(%q.2), replica_groups=mesh['x'=4,'y'=2] {'x','y'}, frontend_attributes={chain_id="0"}
  ROOT %call.2 = bf16[8,640]{1,0} custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%called (g: bf16[4,640], t: token[]) -> bf16[8,640] {
  %g = bf16[4,640]{1,0} parameter(0)
  %t = token[] parameter(1)
  ROOT %gather.3 = bf16[8,640]{1,0} all-gather(%g), replica_groups=mesh['x'=4,'y'=2] {'y'}
}, execution_thread="sparsecore"

%all-reduce-scatter.1 (r: f32[64,10]) -> f32[16,10] {
  %r = f32[64,10]{1,0} parameter(0)
  %reduce = f32[64,10]{1,0} all-reduce(%r), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %slice = f32[16,10]{1,0} dynamic-slice(%reduce, %r), dynamic_slice_sizes={16,10}
}

ENTRY %main (x: bf16[32,640], y: bf16[1,640], z: f32[64,10]) -> bf16[32,640] {
  %zero = u32[]{:T(128)} constant(0)
  %x = bf16[32,640]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[1,640]{1,0} parameter(1)
  %z = f32[64,10]{1,0} parameter(2)
  %fusion.1 = (bf16[1,640]{1,0}, bf16[8,640]{1,0}) fusion(%y), kind=kCustom, calls=%starts
  %fusion.2 = bf16[8,640]{1,0} fusion(%y), kind=kCustom, calls=%ends
  %fusion.3 = f32[16,10]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
  %call-start = ((bf16[4,640]{1,0}, token[]), bf16[8,640]{1,0}) call-start(%y, %z), async_execution_thread="sparsecore", to_apply=%called
  %call-done = bf16[8,640]{1,0} call-done(%call-start)
  %first = (u32[]{:T(128)}, bf16[32,640]{1,0:T(8,128)(2,1)}) tuple(%zero, %x)
  %loop = (u32[]{:T(128)}, bf16[32,640]{1,0:T(8,128)(2,1)}) while(%first), condition=%cond, body=%body
  ROOT %out = bf16[32,640]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_collectives_of_a_tpu_program():
    found = hlo.collectives(hlo.Module(TPU_PROGRAM))
    assert found.kinds == {
        "all-gather": Traffic(2, 7 * 640 * 2 + 4 * 640 * 2),
        "reduce-scatter": Traffic(1, 3 * 16 * 10 * 4),
        "collective-permute": Traffic(2, 2 * 32 * 640 * 2),
    }
    assert found.uncounted_loops == 0


GPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%scatter (p: f32[64,10]) -> f32[16,10] {
  %p = f32[64,10]{1,0} parameter(0)
  ROOT %part = f32[16,10]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%sum
}

ENTRY %main (x: bf16[32,640], z: f32[64,10]) -> bf16[32,640] {
  %x = bf16[32,640]{1,0} parameter(0)
  %z = f32[64,10]{1,0} parameter(1)
  %trade = ((bf16[32,640]{1,0}), bf16[32,640]{1,0}) all-to-all-start(%x), replica_groups={{0,1},{2,3}}, dimensions={0}
  %part = ((f32[64,10]{1,0}), f32[16,10]{1,0}) reduce-scatter-start(%z), replica_groups={{0,1,2,3}}, dimensions={0}
  %whole = (bf16[32,640]{1,0}, bf16[128,640]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %whole-done = bf16[128,640]{1,0} all-gather-done(%whole)
  %part-done = f32[16,10]{1,0} reduce-scatter-done(%part)
  ROOT %out = bf16[32,640]{1,0} all-to-all-done(%trade)
}
"""


def test_collectives_of_a_gpu_program():
    """What starts one holds its operands as well as its result."""
    assert hlo.collectives(hlo.Module(GPU_PROGRAM)).kinds == {
        "all-gather": Traffic(1, 3 * 32 * 640 * 2),
        "reduce-scatter": Traffic(1, 3 * 16 * 10 * 4),
        "all-to-all": Traffic(1, 16 * 640 * 2),
    }


def test_a_loop_of_unknown_length_is_told():
    found = hlo.collectives(hlo.Module(TPU_PROGRAM.replace("add(%counter.2, %two)", "multiply(%counter.2, %two)")))
    assert found.kinds["collective-permute"].times == 1
    assert found.uncounted_loops == 1


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
def test_the_compiler_says_by_how_much(message, sizes):
    assert too_large(message) == sizes


def plan(mesh=(1, 4, 2, 1), needed=10 * GIB, recomputed=5, sent=7, **values):
    known = {
        "program": "training step", "topology": "v5e:2x4", "chips": 8, "devices": 8,
        "mesh": dict(zip(("data", "fsdp", "sequence", "tensor"), mesh, strict=True)), "remat": "full", "clips": 4,
        "tokens": 32760, "flops": {"forward": 1, "backward": 2, "recomputed": recomputed, "scores": 3},
        "peak_flops": 197e12, "arguments": GIB, "needed": needed, "available": round(15.75 * GIB),
        "compile_seconds": 1.0, "cpu_seconds": 2.0, "compiler_memory": 3 * 10**9, "temporaries": 8 * GIB,
        "code": GIB // 8, "host": 0, "collectives": {"all-gather": Traffic(2, sent)},
    }  # fmt: skip
    return Plan(**{**known, **values})


def test_what_is_too_large_is_told_with_the_bytes_over():
    text = describe(plan(needed=20 * GIB, temporaries=None, code=None, collectives=None))
    assert f"DOES NOT FIT: {round(4.25 * GIB):,} bytes (4.25 GiB) over" in text
    assert "compiled, not run" in text
    assert "not known" in text


def test_what_fits_is_told_with_the_bytes_left():
    text = describe(plan(program="sampling step", remat=None, flops={"forward": 10**15}))
    assert "fits, 5.75 GiB to spare" in text
    assert "data=1 fsdp=4 sequence=2 tensor=1; 4 clips of 32,760 tokens" in text


def test_a_plan_survives_json():
    assert Plan.from_json(json.loads(json.dumps(plan().as_json()))) == plan()


@pytest.mark.parametrize(
    "name",
    ["v9:2x2", "v5e", "v5e:", "v5e:2y2", "v5e:2x4 ", "h100:2x2x2", "2xh100:4", "-1xv5e:2x4", "0xv5e:2x4", "h100:0"],
)
def test_an_unknown_topology_is_one_line(name):
    with pytest.raises(InputError) as told:
        topology(name)
    assert str(told.value).startswith(f"--topology={name}: expected")
    assert "v5e:4x4" in str(told.value)


@pytest.mark.parametrize(("name", "wheel"), [("v5e:2x4", "jax[tpu]=="), ("h100:4", "jax-cuda13-pjrt==")])
def test_a_compiler_that_is_missing_is_one_line_with_the_command(monkeypatch, name, wheel):
    monkeypatch.setattr(chips, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"^--topology=\S+: needs .* pip install") as told:
        topology(name)
    assert wheel in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ("v5p:8", "v5p:2x2x2 has 8 chips"),
        ("v5p:4", "v5p:2x2x1 has 4 chips"),
        ("v4:32", "v4:2x4x4 has 32 chips"),
        ("v5e:8", "v5e:2x4 has 8 chips"),
        ("v6e:16", "v6e:4x4 has 16 chips"),
        ("v5p:12", "the chips along each axis, such as"),
        ("v5p:3x3x3", "a shape that exists, such as"),
    ],
)
def test_a_number_of_chips_is_answered_with_the_shape(shape, hint):
    assert hint in chips._shape_hint(shape)


def nowhere(kind, devices):
    """A topology for what does not compile."""
    return Topology(f"{kind}:{devices}", kind, (SimpleNamespace(platform="cpu"),) * devices)


def paper(batch=4):
    return load(TrainPlan, "wan2.1_t2v_14b", {"train.batch_size": batch})


@pytest.mark.parametrize(
    ("kind", "dtype", "passes"), [("v5e", "bfloat16", 3), ("v5e", "float32", 1), ("h100", "bfloat16", 1)]
)
def test_products_that_attention_makes_again(kind, dtype, passes):
    run = paper()
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype=dtype))
    once = training_flops(programs.network(run.model), run.lora, run.train.remat, 4, programs.tokens(run)).scores
    assert flops(run, nowhere(kind, 4), 4)["scores"] == passes * once


def test_memory_of_gpus_is_what_jax_takes_of_it(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert nowhere("h100", 4).memory == round(0.75 * CHIPS["h100"].memory)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert nowhere("h100", 4).memory == round(0.9 * CHIPS["h100"].memory)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")  # the newer name
    assert nowhere("h100", 4).memory == round(0.95 * CHIPS["h100"].memory)
    assert nowhere("v5e", 4).memory == round(15.75 * GIB)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(InputError, match="XLA_CLIENT_MEM_FRACTION=most: expected a number"):
        _ = nowhere("h100", 4).memory


def test_candidates_split_everything_evenly_and_hold_the_weights():
    found = candidates(paper(), nowhere("v5e", 16))
    assert MeshConfig(data=1, fsdp=4, sequence=4) in [candidate.mesh for candidate in found]
    for mesh, arguments, *_ in found:
        assert mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor == 16
        assert 4 % (mesh.data * mesh.fsdp) == 32760 % mesh.sequence == 40 % mesh.tensor == 0
        assert arguments < 15.75 * GIB
    # No mesh holds what `none` keeps. Those come first that seem to hold what `attention` keeps.
    assert all(memory[0] > 15.75 * GIB for _, _, memory, _ in found)
    holds = [memory[1] < 15.75 * GIB for _, _, memory, _ in found]
    assert holds == sorted(holds, reverse=True)
    assert any(holds)
    assert not all(holds)
    first = [candidate.sent for candidate, holding in zip(found, holds, strict=True) if holding]
    assert first == sorted(first)


def test_candidates_that_nothing_makes_fit_come_by_memory():
    found = candidates(paper(batch=64), nowhere("v5e", 8))
    assert all(min(memory) > 15.75 * GIB for _, _, memory, _ in found)
    assert [memory[-1] for _, _, memory, _ in found] == sorted(memory[-1] for _, _, memory, _ in found)


def test_candidates_split_data_over_slices():
    chips = [SimpleNamespace(platform="tpu", slice_index=number // 8) for number in range(16)]
    found = candidates(paper(batch=16), Topology("2xv5e:2x4", "v5e", chips))
    assert found
    assert all(candidate.mesh.data % 2 == 0 for candidate in found)


def test_no_candidate_is_one_line():
    with pytest.raises(InputError, match=r"^--topology=v5e:11: no mesh .* batch of 4"):
        candidates(paper(), nowhere("v5e", 11))


def test_search_takes_least_recomputation_first_and_then_least_sent(capsys):
    tried = []

    def make(run, where):
        mesh, remat = (getattr(run.mesh, axis) for axis in ("data", "fsdp", "sequence", "tensor")), run.train.remat
        mesh = tuple(mesh)
        tried.append((mesh, remat))
        needs = {"none": 40, "attention": 17.8, "full": 11}[remat] - 2 * len({m for m, _ in tried})
        return plan(mesh, round(needs * GIB), sent=100 - len(tried), remat=remat, flops=flops(run, where, 4))

    found = search(paper(), nowhere("v5e", 16), 4, make=make)
    assert [p.remat for p in found] == ["attention"] * 3 + ["full"]
    assert [p.sent for p in found[:3]] == sorted(p.sent for p in found[:3])
    # `none` needs several times the memory and is never compiled. The first mesh fits with full alone; the second fits
    # with attention, and full is not tried again.
    assert [remat for _, remat in tried] == ["attention", "full", *("attention",) * 3]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 2 * 5
    assert "compiling the 4 most promising" in lines[0]
    assert "1/4 data=2 fsdp=2 sequence=4 tensor=1 remat=attention: compiling" in lines[1]


def test_search_goes_on_after_a_failure_of_the_compiler(capsys):
    def make(run, where):
        if run.mesh.data > 1 or where.name == "v5e:8":
            raise CompilerError("no such kernel")
        return plan()

    found = search(paper(), nowhere("v5e", 16), 4, make=make)
    assert found
    assert "remat=attention: no such kernel" in capsys.readouterr().err
    with pytest.raises(CompilerError, match="on every mesh"):
        search(paper(), nowhere("v5e", 8), 1, make=make)


def test_search_ranks_a_tight_fit_last_and_looks_further(capsys):
    def make(run, where):
        needs = {"attention": 15.3, "full": 9}[run.train.remat]
        return plan(needed=round(needs * GIB), remat=run.train.remat, flops=flops(run, where, 4))

    found = search(paper(), nowhere("v5e", 16), 1, make=make)
    assert [(p.remat, p.tight) for p in found] == [("full", False), ("attention", True)]
    assert "only 0.45 GiB to spare" in describe(found[1])


def test_search_keeps_to_the_policy_that_is_asked_for():
    tried = []

    def make(run, where):
        tried.append(run.train.remat)
        return plan()

    search(paper(), nowhere("v5e", 16), 2, ["none"], make)
    assert tried == ["none"] * 2


def test_search_that_finds_nothing_gives_what_is_closest():
    def make(run, where):
        return plan(needed=(30 if run.train.remat == "full" else 50) * GIB)

    (found,) = search(paper(), nowhere("v5e", 16), 2, make=make)
    assert not found.fits
    assert found.needed == 30 * GIB


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The maker of docs/scaling.md with plans made up, and what it compiled."""
    calls = []

    def compile(file, options):
        calls.append(options)
        chips = math.prod(map(int, options[0].partition(":")[2].split("x")))
        remat = options[-1].partition("=")[2]
        again = {"forward": 1, "backward": 2, "recomputed": {"none": 0, "full": 10**19}.get(remat, 10**15)}
        return plan(needed=(14 if remat == "full" else 99) * GIB, chips=chips, remat=remat, flops=again).as_json()

    monkeypatch.setattr(scaling, "_compile", compile)
    monkeypatch.setattr(scaling, "topology", lambda name: nowhere(name.partition(":")[0], math.prod(
        map(int, name.partition(":")[2].split("x")))))  # fmt: skip
    return calls


def test_the_page_goes_on_where_it_was_interrupted(compiled, tmp_path):
    file = tmp_path / "plans.json"
    maker = scaling.Scaling(file)
    first = list(scaling.rows(maker, 2, ["v5e-16"]))
    assert len(compiled) == len(json.loads(file.read_text())) == 4 * 2 * 2
    again = scaling.Scaling(file)
    assert list(scaling.rows(again, 2, ["v5e-16"])) == first
    assert len(compiled) == 16

    curves = scaling.growth(again)
    assert [[p.chips for p in plans] for plans in curves.values()] == [[8, 16, 32, 64, 128, 256, 512, 1024]] * 2
    levers = scaling.policies(again)
    assert [p.remat for p in levers] == ["full", "attention", "attention_offload", "none"]
    page = scaling.write_document(first, levers, curves, tmp_path / "docs", "python scripts/scaling.py").read_text()
    assert "Compiled, not run" in page
    assert page.count("| v5e-16 |") == 4
    lines = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert [len(set(table)) for table in (lines[:6], lines[6:12], lines[12:])] == [1, 1, 1]
    assert len(lines) == 6 + 6 + 2 + 2 * 8
    assert (tmp_path / "docs/scaling.png").stat().st_size < 60_000


def test_the_page_says_what_is_not_compiled_yet(compiled, tmp_path):
    maker = scaling.Scaling(tmp_path / "plans.json", compile_missing=False)
    found = list(scaling.rows(maker, 2, ["v5e-8"]))
    levers, curves = scaling.policies(maker), scaling.growth(maker)
    page = scaling.write_document(found, levers, curves, tmp_path, "scaling.py").read_text()
    assert not compiled
    assert "| v5e-8 | 14B | 480p | not compiled |" in page


@pytest.mark.parametrize("content", ['{"a": 1}', "[]", "{", '{"a": {"program": 1}}'])
def test_results_of_something_else_are_one_line(tmp_path, content):
    (tmp_path / "plans.json").write_text(content)
    with pytest.raises(InputError, match="not the results of scaling"):
        scaling.Scaling(tmp_path / "plans.json")


def run_program(tmp_path, *options):
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, str(ROOT / "scripts/plan.py"), "--config", str(tmp_path / "tiny.yaml"), *options]
    return subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "tpu"}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--topology=v9:2x2"], "--topology=v9:2x2: expected one of"),
        (["--topology=v5e:2x2", "--search", "--mesh.fsdp=2"], "--mesh.fsdp=2: --search chooses the mesh"),
        (["--topology=v5e:2x2", "--model.heads=7"], "--model.heads=7: expected a divisor of dim=64"),
    ],
)
def test_the_program_tells_bad_input_in_one_line(tmp_path, options, problem):
    done = run_program(tmp_path, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {problem}")
    assert done.stderr.count("\n") == 1


def test_the_topology_is_required(tmp_path):
    done = run_program(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--topology" in done.stderr
    assert "v5e:4x4" in done.stderr


def test_help_has_the_options_and_all_fields(tmp_path):
    done = run_program(tmp_path, "--help")
    assert done.returncode == 0
    assert "--search" in done.stdout
    assert "--mesh.fsdp" in done.stdout


# What follows needs the TPU compiler, which is in the extra `test`.


NINE = ("--clip.frames=1", "--clip.height=48", "--clip.width=48")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--topology=v5e:3x5"], "--topology=v5e:3x5: "),
        (["--topology=v5e:2x2", "--mesh.fsdp=3"], "mesh.fsdp=3 does not divide the 4 devices"),
        (["--topology=v5e:2x2", "--mesh.data=3"], "mesh.data=3 x "),
        (["--topology=v5e:2x4", "--mesh.tensor=8"], "mesh.tensor=8 does not divide the 2 heads"),
        (
            ["--topology=v5e:4x4", "--mesh.fsdp=2", "--mesh.sequence=8", *NINE],
            "mesh.sequence=8 does not divide the 9 tokens",
        ),
        (["--topology=v5e:2x2"], "train.batch_size=2: expected a multiple of"),
    ],
)
def test_meshes_that_do_not_go_are_one_line(tmp_path, options, problem):
    done = run_program(tmp_path, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {problem}")
    assert done.stderr.count("\n") == 1


def test_a_step_is_compiled_for_tpus(parsed):
    where = topology("v5e:2x2")
    run = parsed(TrainPlan, "--mesh.fsdp=2", "--mesh.sequence=2", "--model.dtype=bfloat16")
    found = make_plan(run, where)
    assert found.fits
    assert (found.chips, found.mesh["fsdp"], found.mesh["sequence"]) == (4, 2, 2)
    assert found.collectives["all-gather"].bytes > 0
    assert found.collectives["all-to-all"].times >= 3 * 4 * 2
    assert found.uncounted_loops == 0
    whole = make_plan(dataclasses.replace(run, mesh=MeshConfig(data=2, sequence=2)), where)
    assert found.arguments < whole.arguments


def test_sampling_is_compiled_for_tpus(parsed):
    found = make_plan(parsed(SamplePlan, "--mesh.fsdp=2"), topology("v5e:2x2"))
    assert found.fits
    assert found.clips == 4
    assert found.program == "sampling step"


def test_a_step_too_large_exits_with_1_and_the_bytes_over(tmp_path):
    sizes = ["--model.dim=5120", "--model.ffn_dim=13824", "--model.heads=40", "--model.layers=40"]
    clip = ["--clip.frames=81", "--clip.height=480", "--clip.width=832", "--model.dtype=bfloat16"]
    mesh = ["--topology=v5e:2x2", "--mesh.fsdp=2", "--mesh.sequence=2", "--train.batch_size=8"]
    done = run_program(tmp_path, *mesh, *sizes, *clip)
    assert done.returncode == 1, done.stderr
    over = re.search(r"DOES NOT FIT: ([\d,]+) bytes", done.stdout)
    assert int(over[1].replace(",", "")) > GIB


def test_what_the_compiler_refuses_by_less_than_it_says_does_not_fit(parsed, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("total memory (15.75G) exceeds available HBM (15.75G)")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    found = make_plan(parsed(TrainPlan, "--mesh.sequence=2", "--mesh.fsdp=2"), topology("v5e:2x2"))
    assert not found.fits
    assert found.over == 1


def test_a_failure_of_the_compiler_is_told(parsed, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: no\nway")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(CompilerError) as caught:
        make_plan(parsed(TrainPlan, "--mesh.sequence=2", "--mesh.fsdp=2"), topology("v5e:2x2"))
    assert errors.describe(caught.value) == ("the compiler failed: INTERNAL: no way", 3)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "2xv5e:2x2"])
def test_tpus_form_a_mesh(name):
    where = topology(name)
    slices, per_chip = (2 if name.startswith("2x") else 1), CHIPS[where.kind].per_chip
    assert where.chips == 4 * slices
    assert make_mesh(MeshConfig(data=slices, fsdp=4 * per_chip), where.devices).size == 4 * slices * per_chip


def plan_of_14b(*options):
    """Of the paper's recipe: 480 x 832 x 81, rank 32."""
    file = str(ROOT / "configs/wan2.1_t2v_14b.yaml")
    command = [sys.executable, str(ROOT / "scripts/plan.py"), "--config", file, *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Plan.from_json(json.loads(done.stdout))


def test_14b_compiles_for_a_pod_within_5_minutes_of_two_cores_and_8_gb():
    found = plan_of_14b("--topology=v5p:4x4x4", "--mesh.fsdp=8", "--train.batch_size=64")
    assert found.fits
    assert found.cpu_seconds < 600
    assert found.compiler_memory < 8e9


@pytest.mark.slow
@pytest.mark.parametrize(("where", "sequence"), [("v5e:2x4", 2), ("v5e:4x4", 4), ("v6e:2x4", 2), ("v5p:2x2x1", 1)])
def test_14b_fits_on_small_machines_with_four_clips(where, sequence):
    found = plan_of_14b(f"--topology={where}", "--mesh.fsdp=4", f"--mesh.sequence={sequence}")
    assert found.fits
    assert (found.clips, found.tokens, found.mesh["sequence"]) == (4, 32760, sequence)


def test_devices_of_a_chip():
    assert nowhere("tpu7x", 8).chips == 4
    assert np.isclose(CHIPS["tpu7x"].peak, 2307e12 / 2)
    assert next(iter(searching.KEPT)) == "none"
