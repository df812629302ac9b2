"""How often the instructions of compiled programs run, and what their collectives send."""

import subprocess
import sys

import pytest
from helpers import virtual_devices

from tfm_jax.planning import hlo
from tfm_jax.planning.hlo import Traffic

# Every kind of collective, once outside and once inside a loop of 5 iterations, in groups of 4 of the 8 devices.
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


def all_collectives(times):
    block = 2048
    return {
        "all-gather": Traffic(times, times * 3 * block),
        "all-reduce": Traffic(times, times * 2 * block * 3 // 4),
        "reduce-scatter": Traffic(times, times * 3 * block),
        "all-to-all": Traffic(times, times * block * 3 // 4),
        "collective-permute": Traffic(times, times * block),
    }


def test_collectives_are_counted_by_kind_bytes_and_iterations(program_of_collectives):
    found = hlo.collectives(hlo.Module(program_of_collectives))
    assert found.uncounted_loops == 0
    assert found.kinds == all_collectives(1 + 5)


def test_collectives_in_a_loop_without_trip_count_count_once(program_of_collectives):
    text = program_of_collectives.replace("known_trip_count", "unknown")
    assert text != program_of_collectives
    found = hlo.collectives(hlo.Module(text))
    assert found.uncounted_loops == 5
    assert found.kinds == all_collectives(1 + 1)


# Shortened from TPU programs: a loop unrolled twice, whose counter goes to 4 in steps of 2, with a permutation split
# into start and done; a gather split over two fusions; a gather on another core; a reduce-scatter by the name of its
# fusion.
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
    """The shape of a start lists the operands as well as the result."""
    assert hlo.collectives(hlo.Module(GPU_PROGRAM)).kinds == {
        "all-gather": Traffic(1, 3 * 32 * 640 * 2),
        "reduce-scatter": Traffic(1, 3 * 16 * 10 * 4),
        "all-to-all": Traffic(1, 16 * 640 * 2),
    }


def test_a_loop_of_unknown_trip_count_is_reported():
    found = hlo.collectives(hlo.Module(TPU_PROGRAM.replace("add(%counter.2, %two)", "multiply(%counter.2, %two)")))
    assert found.kinds["collective-permute"].times == 1
    assert found.uncounted_loops == 1
