"""The bound of a program from its text: operations, bytes, loops, transfers in the background, and classes."""

import dataclasses
import json

import pytest
from helpers.plans import fake_plan

from tfm_jax.planning import hlo
from tfm_jax.planning.chips import Chip
from tfm_jax.planning.hlo import Module
from tfm_jax.planning.operations import list_operations
from tfm_jax.planning.plan import Plan
from tfm_jax.planning.roofline import classify, make_roofline, origin
from tfm_jax.planning.roofline_tables import describe_roofline

CHIP = Chip(memory=1, peak=1e12, bandwidth=1e9, interconnect=1e8)

# A loop of 5 iterations. Each multiplies by one layer of the stacked weights, applies an adapter, and stores its result
# in a stack, while the next block travels to the other device.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=2

%layer (w: f32[5,64,64], x: f32[32,64], i: s32[]) -> f32[32,64] {
  %w = f32[5,64,64]{2,1,0} parameter(0)
  %x = f32[32,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %slice = f32[1,64,64]{2,1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,64,64}
  %kernel = f32[64,64]{1,0} bitcast(%slice)
  ROOT %y = f32[32,64]{1,0} dot(%x, %kernel), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/transpose(jvp())/while/body/closed_call/ffn/dot_general"}
}

%store (stack: f32[5,32,64], x: f32[32,64], i: s32[]) -> f32[5,32,64] {
  %stack = f32[5,32,64]{2,1,0} parameter(0)
  %x = f32[32,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,32,64]{2,1,0} bitcast(%x)
  ROOT %update = f32[5,32,64]{2,1,0} dynamic-update-slice(%stack, %row, %i)
}

%norm (x: f32[32,64]) -> f32[32,64] {
  %x = f32[32,64]{1,0} parameter(0)
  ROOT %sine = f32[32,64]{1,0} sine(%x)
}

%body (p: (s32[], f32[32,64], f32[5,64,64], f32[5,32,64], f32[64,4])) -> (s32[], f32[32,64], f32[5,64,64], f32[5,32,64], /*index=4*/f32[64,4]) {
  %p = (s32[], f32[32,64]{1,0}, f32[5,64,64]{2,1,0}, f32[5,32,64]{2,1,0}, /*index=4*/f32[64,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[32,64]{1,0} get-tuple-element(%p), index=1
  %w = f32[5,64,64]{2,1,0} get-tuple-element(%p), index=2
  %stack = f32[5,32,64]{2,1,0} get-tuple-element(%p), index=3
  %a = f32[64,4]{1,0} get-tuple-element(%p), index=4
  %send = (f32[32,64]{1,0}, f32[32,64]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(step)/while/body/self_attn/ppermute"}
  %y = f32[32,64]{1,0} fusion(%w, %x, %i), kind=kOutput, calls=%layer
  %low = f32[32,4]{1,0} dot(%y, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/while/body/ffn/lora/dot_general"}
  %kept = f32[5,32,64]{2,1,0} fusion(%stack, %y, %i), kind=kLoop, calls=%store
  %received = f32[32,64]{1,0} collective-permute-done(%send)
  %normed = f32[32,64]{1,0} fusion(%received), kind=kLoop, calls=%norm
  ROOT %all = (s32[], f32[32,64]{1,0}, f32[5,64,64]{2,1,0}, f32[5,32,64]{2,1,0}, /*index=4*/f32[64,4]{1,0}) tuple(%i, %normed, %w, %kept, /*index=4*/%a)
}

%condition (p: (s32[], f32[32,64], f32[5,64,64], f32[5,32,64], f32[64,4])) -> pred[] {
  %p = (s32[], f32[32,64]{1,0}, f32[5,64,64]{2,1,0}, f32[5,32,64]{2,1,0}, /*index=4*/f32[64,4]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (start: (s32[], f32[32,64], f32[5,64,64], f32[5,32,64], f32[64,4])) -> (s32[], f32[32,64], f32[5,64,64], f32[5,32,64], f32[64,4]) {
  %start = (s32[], f32[32,64]{1,0}, f32[5,64,64]{2,1,0}, f32[5,32,64]{2,1,0}, /*index=4*/f32[64,4]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[32,64]{1,0}, f32[5,64,64]{2,1,0}, f32[5,32,64]{2,1,0}, /*index=4*/f32[64,4]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501

BLOCK, KERNEL, LOW, ADAPTER = 32 * 64 * 4, 64 * 64 * 4, 32 * 4 * 4, 64 * 4 * 4
"""Sizes of the program's arrays in bytes."""


def operation(text, name):
    (found,) = [x for computation in list_operations(Module(text)).values() for x in computation if x.name == name]
    return found


@pytest.mark.parametrize(
    ("name", "flops", "size"),
    [
        ("y", 2 * 32 * 64 * 64, KERNEL + 2 * BLOCK + 4),  # one layer of the weights counts, and the index
        ("low", 2 * 32 * 64 * 4, BLOCK + ADAPTER + LOW),
        ("kept", 0, 2 * BLOCK + 4),  # the rest of the stack stays where it is
        ("normed", 0, 2 * BLOCK),
        ("send", 0, 2 * BLOCK),
    ],
)
def test_costs_of_one_run(name, flops, size):
    found = operation(PROGRAM, name)
    assert (found.times, found.flops, found.bytes) == (5, flops, size)


def test_the_bound_adds_up_the_largest_bound_of_every_operation():
    found = make_roofline(Module(PROGRAM), CHIP)
    behind = (KERNEL + 2 * BLOCK + 4) + (BLOCK + ADAPTER + LOW) + (2 * BLOCK + 4)  # bytes, while the block travels
    sending = BLOCK / CHIP.interconnect
    assert sending > behind / CHIP.bandwidth
    after = 2 * BLOCK / CHIP.bandwidth
    assert found.bound == pytest.approx(5 * (sending + after))
    assert found.flops == 5 * 2 * 32 * 64 * (64 + 4)
    slow = CHIP._replace(peak=1e6)  # now the products take longer than the transfer, and hide it
    products = 2 * 32 * 64 * (64 + 4) / slow.peak + (2 * BLOCK + 4) / slow.bandwidth
    assert make_roofline(Module(PROGRAM), slow).bound == pytest.approx(5 * (products + after))


def test_the_hidden_part_of_a_transfer_is_what_runs_before_its_end():
    (row,) = make_roofline(Module(PROGRAM), CHIP).collectives
    assert row.name == "collective-permute: self_attn/ppermute"
    assert (row.runs, row.sent) == (5, 5 * BLOCK)
    behind = (KERNEL + 2 * BLOCK + 4) + (BLOCK + ADAPTER + LOW) + (2 * BLOCK + 4)
    assert row.hidden == pytest.approx(5 * behind / CHIP.bandwidth)
    assert row.bound + row.hidden == pytest.approx(5 * BLOCK / CHIP.interconnect)
    early = PROGRAM.replace("%y = f32[32,64]{1,0} fusion(%w, %x", "%y = f32[32,64]{1,0} fusion(%w, %received")
    early = early.replace("  %received =", "  %never = f32[] constant(0)\n  %late =")
    early = early.replace("  %y = ", "  %received = f32[32,64]{1,0} collective-permute-done(%send)\n  %y = ")
    early = early.replace("  %late = f32[32,64]{1,0} collective-permute-done(%send)\n", "")
    (row,) = make_roofline(Module(early), CHIP).collectives
    assert row.hidden == 0


def test_operations_are_classified_by_the_scopes_of_the_model():
    assert [classify(operation(PROGRAM, name)) for name in ("y", "low", "kept", "normed", "send")] == [
        "linear layers", "LoRA", "copies and layout", "elementwise", "collectives",
    ]  # fmt: skip
    moved = PROGRAM.replace("ffn/dot_general", "self_attn/attention_kernel/dot_general")
    assert classify(operation(moved, "y")) == "attention"


def test_the_origin_of_an_operation_is_its_place_in_the_model():
    assert origin(operation(PROGRAM, "y").scope) == "ffn/dot_general backward"
    again = "jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/ffn/lora/add"
    assert origin(again) == "ffn/lora/add recomputed"
    assert origin("") == "no scope"


# Shortened from TPU programs: a gather that three fusions start, continue behind a product, and end; a kernel with
# metadata in several lines, whose operands are partly in VMEM; a product with a batch, written as a convolution.
TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%begin (q: bf16[256,256]) -> (bf16[256,256], bf16[1024,256]) {
  %q = bf16[256,256]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[1024,256]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/squeeze"}
  ROOT %call.1 = (bf16[256,256]{1,0:T(8,128)(2,1)}, bf16[1024,256]{1,0:T(8,128)(2,1)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%product (q: bf16[256,256], whole: bf16[1024,256], x: bf16[512,256], k: bf16[256,8]) -> (bf16[512,8], bf16[256,256], bf16[1024,256]) {
  %q = bf16[256,256]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(1)
  %x = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(2)
  %k = bf16[256,8]{1,0:T(8,128)(2,1)S(1)} parameter(3)
  %gather.2 = bf16[1024,256]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  %y = bf16[512,8]{1,0:T(8,128)(2,1)} convolution(%x, %k), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp()/lora/dot_general"}
  ROOT %all = (bf16[512,8]{1,0:T(8,128)(2,1)}, bf16[256,256]{1,0:T(8,128)(2,1)}, bf16[1024,256]{1,0:T(8,128)(2,1)}) tuple(%y, %q, %gather.2)
}

%finish (q: bf16[256,256], whole: bf16[1024,256]) -> bf16[1024,256] {
  %q = bf16[256,256]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(1)
  %gather.3 = bf16[1024,256]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %call.3 = bf16[1024,256]{1,0:T(8,128)(2,1)} custom-call(%q, %whole, %gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (q: bf16[256,256], x: bf16[512,256], k: bf16[256,8], heads: bf16[4,1024,128]) -> bf16[1024,256] {
  %q = bf16[256,256]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(1)
  %k = bf16[256,8]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %heads = bf16[4,1024,128]{2,1,0:T(8,128)(2,1)} parameter(3)
  %near = bf16[4,1024,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(4)
  %start = (bf16[256,256]{1,0:T(8,128)(2,1)}, bf16[1024,256]{1,0:T(8,128)(2,1)}) fusion(%q), kind=kCustom, calls=%begin
  %source = bf16[256,256]{1,0:T(8,128)(2,1)} get-tuple-element(%start), index=0
  %target = bf16[1024,256]{1,0:T(8,128)(2,1)} get-tuple-element(%start), index=1
  %step = (bf16[512,8]{1,0:T(8,128)(2,1)}, bf16[256,256]{1,0:T(8,128)(2,1)}, bf16[1024,256]{1,0:T(8,128)(2,1)}) fusion(%source, %target, %x, %k), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"3716"}}
  %from = bf16[256,256]{1,0:T(8,128)(2,1)} get-tuple-element(%step), index=1
  %into = bf16[1024,256]{1,0:T(8,128)(2,1)} get-tuple-element(%step), index=2
  %whole = bf16[1024,256]{1,0:T(8,128)(2,1)} fusion(%from, %into), kind=kCustom, calls=%finish
  %splash_mha_bwd.1 = (bf16[4,1024,128]{2,1,0:T(8,128)(2,1)}, bf16[4,1024,128]{2,1,0:T(8,128)(2,1)}) custom-call(%heads, %near, %near), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="jit(step)/transpose(jvp())/self_attn/attention_kernel/pallas_call"}
  %ahead = ((bf16[4,1024,128]{2,1,0:T(8,128)(2,1)}), bf16[1,1024,128]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%heads), slice={[0:1], [0:1024], [0:128]}
  %other.2 = bf16[512,256]{1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="tpu_custom_call"
  %arrived = bf16[1,1024,128]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%ahead)
  %batched = f32[2,16,32]{2,1,0} convolution(%p, %w), window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf
  ROOT %result = bf16[1024,256]{1,0:T(8,128)(2,1)} bitcast(%whole)
}
"""  # noqa: E501
TPU_PROGRAM = TPU_PROGRAM.replace(
    "  %arrived", "  %p = f32[2,16,8]{2,1,0} constant({...})\n  %w = f32[2,8,32]{2,1,0} constant({...})\n  %arrived"
)


def test_a_gather_over_several_fusions_is_one_transfer():
    found = make_roofline(Module(TPU_PROGRAM), CHIP)
    (row,) = found.collectives
    assert (row.name, row.runs, row.sent) == ("all-gather: squeeze", 1, 3 * 256 * 256 * 2)
    assert operation(TPU_PROGRAM, "start").between == ("source", "target", "step", "from", "into")
    # The product reads the operand that is in main memory and writes its result, whose 8 columns are padded to 128.
    product = operation(TPU_PROGRAM, "step")
    assert (product.flops, product.bytes) == (2 * 512 * 256 * 8, 2 * 512 * (256 + 128))
    assert classify(product) == "LoRA"
    assert product.cycles == 3716
    assert row.hidden == pytest.approx(product.bytes / CHIP.bandwidth)


def test_operations_of_an_attention_kernel_follow_from_its_shapes():
    kernel = operation(TPU_PROGRAM, "splash_mha_bwd.1")
    assert classify(kernel) == "attention"
    assert kernel.flops == 5 * 2 * 4 * 1024 * 1024 * 128
    assert kernel.bytes == 3 * 4 * 1024 * 128 * 2  # two operands are in VMEM
    assert origin(kernel.scope) == "self_attn/attention_kernel/pallas_call backward"
    assert make_roofline(Module(TPU_PROGRAM), CHIP).unknown == ["other.2"]


def test_a_slice_that_is_fetched_ahead_counts_as_the_slice():
    slice = operation(TPU_PROGRAM, "ahead")
    assert (slice.bytes, classify(slice), slice.between[0]) == (1024 * 128 * 2, "copies and layout", "other.2")


def test_padded_positions_of_a_convolution_do_not_count():
    assert operation(TPU_PROGRAM, "batched").flops == 2 * 2 * 16 * 8 * 32


GPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[32,64], w: bf16[64,16], q: bf16[1,48,4,8], k: bf16[1,64,4,8]) -> bf16[32,16] {
  %x = bf16[32,64]{1,0} parameter(0)
  %w = bf16[64,16]{1,0} parameter(1)
  %q = bf16[1,48,4,8]{3,2,1,0} parameter(2)
  %k = bf16[1,64,4,8]{3,2,1,0} parameter(3)
  %gemm = (bf16[32,16]{1,0}, s8[100]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %fmha = (bf16[1,48,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  %back = (bf16[1,48,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %y = bf16[32,16]{1,0} get-tuple-element(%gemm), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "flops"), [("gemm", 2 * 32 * 64 * 16), ("fmha", 4 * 48 * 64 * 32), ("back", 10 * 48 * 64 * 32)]
)
def test_operations_of_libraries_on_gpus(name, flops):
    assert operation(GPU_PROGRAM, name).flops == flops


@pytest.mark.parametrize(
    ("shape", "size", "in_hbm"),
    [
        ("f32[5,3]{1,0}", 60, 60),
        ("bf16[1,32760,32]{1,2,0:T(8,128)(2,1)}", 32768 * 32 * 2, 32768 * 32 * 2),
        ("bf16[100,32]{1,0:T(8,128)(2,1)S(1)}", 104 * 128 * 2, 0),
        ("(f32[256]{0:T(256)S(0)}, u32[]{:S(2)}, pred[3]{0})", 1024 + 4 + 3, 1024 + 3),
    ],
)
def test_buffers_include_the_padding_of_tiles(shape, size, in_hbm):
    assert hlo.buffer_bytes(shape) == size
    assert hlo.buffer_bytes(shape, hbm_only=True) == in_hbm


def test_a_roofline_is_described_and_survives_json():
    found = make_roofline(Module(PROGRAM), CHIP)
    plan = fake_plan(roofline=found, flops={"forward": 10**6, "backward": 10**6}, peak_flops=CHIP.peak)
    assert Plan.from_json(json.loads(json.dumps(plan.as_json()))) == plan
    text = describe_roofline(plan)
    assert "a step takes longer, and nothing was run" in text
    assert "collective-permute: self_attn/ppermute" in text
    assert plan.best_utilisation == pytest.approx(2e6 / 8 / CHIP.peak / found.bound)
    assert "compiler's estimate" not in text  # this program has none
    cycles = dataclasses.replace(plan, roofline=make_roofline(Module(TPU_PROGRAM), CHIP))
    assert "without those of unknown kernels: other.2" in describe_roofline(cycles)
    assert "compiler's estimate" in describe_roofline(cycles)
    assert "rejected" in describe_roofline(fake_plan())
