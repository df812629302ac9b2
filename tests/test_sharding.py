"""Meshes of eight virtual devices: results, placement and communication. Remat policies: values and memory."""

import json
import re
import subprocess
import sys
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import virtual_devices
from helpers.paths import HELPERS
from jax.sharding import AbstractMesh, AxisType, Mesh

from tfm_jax.config import MeshConfig, Remat
from tfm_jax.errors import InputError
from tfm_jax.sharding import MESH_AXES, check_batch, check_split, make_mesh, partition_spec, shardings
from tfm_jax.wan.attention import chunked, self_attention
from tfm_jax.wan.remat import POLICIES
from tfm_jax.wan.rotary import rotary_tables
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer

TOKENS, WIDTH = 40, 96
MESHES = ("2x2x2x1", "1x4x2x1", "8x1x1x1", "1x2x2x2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of sharded_runs.py, with the adapters of its training runs."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, HELPERS / "sharded_runs.py", folder],
        env=virtual_devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for name, training in results["trainings"].items():
        with np.load(folder / f"{name}.npz") as arrays:
            training["start"] = {path: x for path, x in arrays.items() if path.startswith("start/")}
            training["end"] = {path: x for path, x in arrays.items() if not path.startswith("start/")}
    return results


# --- The same on every mesh ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_ten_steps_agree_with_those_of_one_device(runs, mesh):
    """Losses and adapters agree to 1e-5, and the changes of the adapters to 1e-4.

    Adam's first updates are close to the sign of the gradient, so rounding is amplified where a gradient is near zero.
    """
    one, many = runs["trainings"]["1x1x1x1"], runs["trainings"][mesh]
    assert len(one["losses"]) == len(set(one["losses"])) == 10
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert len(one["end"]) == 20
    for path, end in one["end"].items():
        start = one["start"][f"start/{path}"]
        np.testing.assert_array_equal(many["start"][f"start/{path}"], start)
        error, change = np.linalg.norm(many["end"][path] - end), np.linalg.norm(end - start)
        assert change > 1e-3 * np.linalg.norm(end), path
        assert error <= 1e-5 * np.linalg.norm(end), path
        assert error <= 1e-4 * change, path


def test_every_array_is_split_as_the_rules_say(runs):
    """The shape of one device's part, and the number of distinct parts: 8 clips, width 96, 128 channels, rank 4."""
    expected = {
        #            q kernel      down kernel    q's A        q's B        down's B     latents
        "2x2x2x1": ([24, 96, 4], [128, 24, 4], [24, 4, 4], [4, 96, 1], [4, 24, 4], [2, 4]),
        "1x4x2x1": ([12, 96, 8], [128, 12, 8], [12, 4, 8], [4, 96, 1], [4, 12, 8], [2, 4]),
        "8x1x1x1": ([96, 96, 1], [128, 96, 1], [96, 4, 1], [4, 96, 1], [4, 96, 1], [1, 8]),
        "1x2x2x2": ([24, 48, 8], [64, 24, 8], [24, 4, 4], [4, 48, 2], [4, 24, 4], [4, 2]),
    }
    for mesh, (q, down, q_a, q_b, down_b, clips) in expected.items():
        found = runs["trainings"][mesh]["parts"]
        stacked = {"q": q, "down": down, "q a": q_a, "q b": q_b, "q a moment": q_a, "down b moment": down_b}
        assert {name: found[name] for name in stacked} == {
            n: [[2, i, o], parts] for n, (i, o, parts) in stacked.items()
        }
        assert found["latents"] == [[clips[0], 5, 4, 8, 4], clips[1]]
        assert found["text"] == [[clips[0], 512, 16], clips[1]]


def test_one_compilation_for_each_clip_shape(runs):
    assert runs["compilations"] == {"misses": 2, "compiled": [1, 1, 0, 0, 0, 0]}


def test_accumulation_on_a_mesh(runs):
    """Four parts of two clips on two devices equal eight clips at once. No clip moves to the other device."""
    result = runs["accumulation"]
    whole, parts = result["losses"]
    assert parts == pytest.approx(whole, rel=1e-5)
    assert result["difference"] < 1e-4
    moved = [shape for kind in ("all-gather", "all-to-all", "collective-permute") for shape in result[kind]]
    assert not any(shape[-4:] == [5, 4, 8, 4] or shape[-2:] == [512, 16] for shape in moved)


def test_sampling_on_a_mesh(runs):
    """The videos are the same, and each step reports to the host once, not once per device."""
    assert runs["samplings"]["difference"] < 1e-5
    assert runs["samplings"]["calls"] == 3


def test_a_base_in_int8_on_a_mesh(runs):
    """Loss and gradients agree with those of one device. Kernels of blocks are gathered in int8; scales are split."""
    result = runs["quantized"]
    one, eight = result["losses"]
    assert eight == pytest.approx(one, rel=1e-5)
    assert result["difference"] < 1e-5
    assert result["parts"] == [[2, 64, 24], [2, 24]]
    kernels = {"[1,96,48]", "[1,48,96]", "[1,96,64]", "[1,64,96]"}
    gathered = {name for name in result["gathered"] if name.lstrip("abcdefghijklmnopqrstuvwxyz0123456789") in kernels}
    assert gathered == {f"s8{kernel}" for kernel in kernels}


# --- Sequence parallelism --------------------------------------------------------------------------------------------


def test_split_attention_equals_whole(runs):
    """Outputs and gradients of self- and cross-attention, with tokens split 2, 4 and 8 ways, heads split or not."""
    kinds = {"8 heads on 2x1x4x1": "all-to-all", "8 heads on 1x2x2x2": "all-to-all"}
    kinds |= {f"6 heads on {mesh}": "collective-permute" for mesh in ("2x1x4x1", "1x2x2x2", "1x1x8x1")}
    assert runs["attentions"].keys() == kinds.keys()
    for name, expected in kinds.items():
        result = runs["attentions"][name]
        assert result["difference"] < 3e-6, name
        assert {kind for kind in ("all-gather", "all-to-all", "collective-permute") if result[kind]} == {expected}, name


@pytest.mark.parametrize(
    ("mesh", "kind", "shape"),
    [
        ("2x2x2x1", "all-to-all", [2, 20, 3, 16]),
        ("1x4x2x1", "all-to-all", [2, 20, 3, 16]),
        ("1x2x2x2", "collective-permute", [4, 20, 3, 16]),
    ],
)
def test_tokens_are_exchanged_and_never_gathered(runs, mesh, kind, shape):
    """6 heads of 16 on 2 devices, or 3 heads, which 2 does not divide. Only weights, and activations outside of the
    blocks, are gathered."""
    training = runs["trainings"][mesh]
    assert shape in training[kind]
    data, fsdp, _, tensor = map(int, mesh.split("x"))
    with_tokens = [lengths for lengths in training["all-gather"] if TOKENS in lengths or lengths[1:4] == [5, 2, 4]]
    assert len(with_tokens) < len(training["all-gather"])
    assert all(np.prod(lengths) < 8 // (data * fsdp) * TOKENS * WIDTH // tensor for lengths in with_tokens)


# --- Meshes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": 3}, "mesh.data=3 x mesh.fsdp=1 x mesh.sequence=1 x mesh.tensor=1 is 3, but there are 8 devices; "
                      "use mesh.data=8 or -1"),
        ({"data": 4, "fsdp": 4}, "mesh.data=4 x mesh.fsdp=4 x mesh.sequence=1 x mesh.tensor=1 is 16, but there are 8 "
                                 "devices; use mesh.data=2 or -1"),
        ({"fsdp": 3}, "mesh.fsdp=3 does not divide the 8 devices; use one of 1, 2, 4, 8"),
        ({"fsdp": 4, "sequence": 4}, "mesh.sequence=4 does not divide the 2 devices left after mesh.fsdp=4; "
                                     "use one of 1, 2"),
        ({"fsdp": 2, "sequence": 2, "tensor": 3}, "mesh.tensor=3 does not divide the 2 devices left after "
                                                  "mesh.fsdp=2 x mesh.sequence=2; use one of 1, 2"),
    ],
)  # fmt: skip
def test_meshes_that_do_not_fit_the_devices_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        make_mesh(MeshConfig(**settings), jax.devices() * 8)
    assert str(error.value) == message


def abstract_mesh(**sizes):
    return AbstractMesh(tuple(sizes.get(name, 1) for name in MESH_AXES), MESH_AXES)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_split(40, 32760, abstract_mesh(tensor=16)),
         "mesh.tensor=16 does not divide the 40 heads of the model; use one of 1, 2, 4, 8"),
        (lambda: check_split(12, 32760, abstract_mesh(fsdp=2, sequence=16)),
         "mesh.sequence=16 does not divide the 32760 tokens of a clip; use one of 1, 2, 4, 8"),
        (lambda: check_batch(6, abstract_mesh(data=2, fsdp=4, tensor=2)),
         "train.batch_size=6: expected a multiple of mesh.data=2 x mesh.fsdp=4; use 8, or smaller mesh.data or "
         "mesh.fsdp and larger mesh.sequence or mesh.tensor"),
    ],
)  # fmt: skip
def test_sizes_that_a_mesh_cannot_split_are_refused(check, message):
    with pytest.raises(InputError) as error:
        check()
    assert str(error.value) == message


def test_sizes_that_a_mesh_can_split():
    mesh = abstract_mesh(fsdp=2, sequence=8, tensor=4)
    check_split(40, 32760, mesh)
    check_batch(2, mesh)


def test_a_parameter_that_the_mesh_cannot_split():
    state = {"kernel": nnx.Param(jnp.zeros((3, 6)), axes=("embed", "heads"))}
    with pytest.raises(
        InputError, match=r"mesh\.fsdp=2 does not divide the embed axis of length 3 of a parameter; use"
    ):
        shardings(state, abstract_mesh(fsdp=2))


def test_the_mesh_of_a_transformer_is_checked_when_it_runs():
    config = TransformerConfig(dim=24, ffn_dim=16, heads=3, layers=1, text_dim=8, freq_dim=8, channels=4)
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1, 2, 2, 4), (1,), (1, 4, 8))]
    mesh = AbstractMesh((1, 1, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(InputError, match=r"mesh\.tensor=2 .* 3 heads"):
        jax.eval_shape(WanTransformer.__call__, model, *arrays)


def test_two_axes_of_an_array_cannot_share_a_mesh_axis():
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        partition_spec(("batch", "embed"))


class Chip:
    """A fake device with the attributes that a mesh looks at, in a pod of several slices."""

    platform, device_kind = "cpu", "chip"

    def __init__(self, number, chips):
        self.id, self.slice_index, self.process_index = number, number // chips, number


def test_only_data_spans_slices():
    chips = [Chip(number, 4) for number in range(8)]
    mesh = make_mesh(MeshConfig(data=4, sequence=2), chips[::-1])
    assert [{chip.slice_index for chip in row.ravel()} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(InputError, match=r"mesh\.data=1: the devices form 2 slices.*a multiple of 2, .* divisor of 4"):
        make_mesh(MeshConfig(sequence=8), chips)


# --- Remat -----------------------------------------------------------------------------------------------------------

REMAT = TransformerConfig(dim=48, ffn_dim=128, heads=4, layers=3, text_dim=16, freq_dim=16, channels=4)


def loss_and_gradient(config=REMAT):
    """A jitted function (latents, model) -> (loss, gradient in the latents)."""

    def loss(latents, model):
        text = jnp.sin(jnp.arange(32.0 * config.text_dim)).reshape(1, 32, -1)
        return jnp.mean(model(latents, jnp.full(1, 500.0), text) ** 2)

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def programs():
    """Policy -> compiled program, loss, gradient. Small chunks leave the memory to the saved activations."""
    model = WanTransformer(REMAT, rngs=nnx.Rngs(0), dtype=jnp.float32)
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 32, 32, 4)), jnp.float32)
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "QUERY_CHUNK", 128)
        for name in POLICIES:
            model.remat = name
            compiled = loss_and_gradient().lower(latents, model).compile()
            results[name] = (compiled, *map(np.asarray, compiled(latents, model)))
    return results


def test_policies_are_those_that_a_configuration_may_name():
    assert set(POLICIES) == set(get_args(Remat))


def test_policies_change_no_value(programs):
    _, loss, gradient = programs["none"]
    assert np.abs(gradient).max() > 0
    for _, other_loss, other in programs.values():
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        assert np.abs(other - gradient).max() <= 1e-6 * np.abs(gradient).max()


def test_attention_runs_forwards_once_where_its_output_is_saved(programs):
    """A block has two attentions. The program contains one block of the forward pass and one of the backward pass."""
    passes = {name: _forward_passes(compiled.as_text()) / 2 for name, (compiled, *_) in programs.items()}
    assert passes == {"full": 2, "attention": 1, "attention_offload": 1, "none": 1}


def test_splitting_keeps_what_a_policy_saves(runs):
    """The same holds for training steps on meshes, with an all-to-all and with a ring."""
    passes = {name: training["forward passes"] / 2 for name, training in runs["trainings"].items()}
    assert passes == {"1x1x1x1": 2, "2x2x2x1": 2, "1x4x2x1": 1, "8x1x1x1": 1, "1x2x2x2": 1}


def test_saved_activations_take_memory(programs):
    """An activation is 512 tokens of width 48 in each of 3 blocks. Both attentions save one each, and "none" also saves
    those of six linear layers (q and o of both attentions, k and v of the first) and of the feed-forward layers."""
    activation = 3 * 512 * 48 * 4
    temporary = {name: compiled.memory_analysis().temp_size_in_bytes for name, (compiled, *_) in programs.items()}
    assert 1.5 * activation < temporary["attention"] - temporary["full"] < 3 * activation
    assert temporary["none"] - temporary["attention"] > 7 * activation
    # A CPU has one memory. The next test checks that programs for TPUs move the outputs to the host.
    assert temporary["attention_offload"] == temporary["attention"]


def _forward_passes(program):
    return len(re.findall(r"reduce_max\S* = f32\S* reduce\(", program))


@pytest.mark.parametrize(("policy", "moves"), [("attention", 0), ("attention_offload", 4)])
def test_outputs_go_to_the_host_and_back(policy, moves):
    """The outputs and `lse` of two attentions move to the host in the forward pass, and back in the backward pass."""
    config = TransformerConfig(dim=256, ffn_dim=128, heads=2, layers=1, text_dim=16, freq_dim=16, channels=4)
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    model.remat = policy
    traced = loss_and_gradient(config).trace(jax.ShapeDtypeStruct((1, 1, 16, 16, 4), jnp.float32), model)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count('_xla_buffer_placement = "pinned_host"') == moves
    assert program.count('_xla_buffer_placement = "device"') == moves


# --- TPUs ------------------------------------------------------------------------------------------------------------


def test_split_attention_compiles_for_tpu(monkeypatch):
    """Splash attention after an all-to-all (12 heads, 4 devices) and in a ring (8 devices)."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices

    def run(query, key, value, gradient):
        rotary = rotary_tables((5, 26, 32), 128)
        out, pullback = jax.vjp(lambda *arrays: self_attention(*arrays, rotary), query, key, value)
        return out, *pullback(gradient)

    for settings, kind in (({"sequence": 4}, "all-to-all"), ({"sequence": 8}, "collective-permute")):
        mesh = make_mesh(MeshConfig(**settings), devices)
        with jax.set_mesh(mesh):
            where = jax.sharding.NamedSharding(mesh, partition_spec(("batch", "tokens", "heads", None)))
            arrays = [jax.ShapeDtypeStruct((2, 4160, 12, 128), jnp.bfloat16, sharding=where)] * 4
            program = jax.jit(run).lower(*arrays).compile().as_text()
        assert program.count('custom_call_target="tpu_custom_call"') == 2
        assert f" {kind}-start(" in program or f" {kind}(" in program
        assert " all-gather" not in program


@pytest.mark.slow
def test_memory_of_the_policies_on_a_tpu(monkeypatch):
    """Offloading uses hardly more device memory than saving nothing, and the saved outputs are on the host."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[0]
    where = jax.sharding.NamedSharding(Mesh(np.array([chip]), ("chip",)), jax.sharding.PartitionSpec())
    config = TransformerConfig(dim=512, ffn_dim=1024, heads=4, layers=6, text_dim=16, freq_dim=16, channels=4)
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    latents = jax.ShapeDtypeStruct((1, 8, 64, 64, 4), jnp.float32, sharding=where)
    activation = 6 * 8192 * 512 * 2
    device, host = {}, {}
    for policy in POLICIES:
        model.remat = policy
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), model)
        memory = loss_and_gradient(config).lower(latents, placed).compile().memory_analysis()
        device[policy], host[policy] = memory.temp_size_in_bytes, memory.host_temp_size_in_bytes
    assert device["attention"] - device["full"] > 1.5 * activation
    assert device["attention_offload"] - device["full"] < 0.7 * activation
    assert device["none"] - device["attention"] > 5 * activation  # q, k, v, the queries of the text, and ffn.0
    assert host["attention_offload"] > 1.9 * activation
    assert host["full"] == host["attention"] == host["none"] == 0
