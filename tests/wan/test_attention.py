"""Each attention kernel against plain softmax attention, and the programs that they compile to."""

import base64
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import virtual_devices
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tfm_jax.wan.attention import ATTENTION_OUTPUT, attention, chunked, cudnn
from tfm_jax.wan.attention.chunked import CHUNKED
from tfm_jax.wan.attention.kernel import Kernel
from tfm_jax.wan.attention.splash import SPLASH

INTERPRETED = Kernel(*(partial(function, interpret=True) for function in SPLASH))


def plain(query, key, value):
    """Softmax attention by its formula, with all scores in memory."""
    scores = jnp.einsum("bsnk,btnk->bnst", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bnst,btnk->bsnk", jax.nn.softmax(scores, axis=-1), value)


def draw(queries, keys, batch=2, heads=3, width=8, dtype=np.float32):
    """Draw query, key, value and a gradient of the output."""
    rng = np.random.default_rng(queries + 10_000 * keys)
    lengths = (queries, keys, keys, queries)
    return [jnp.asarray(rng.standard_normal((batch, n, heads, width)), dtype) for n in lengths]


def with_gradients(function):
    def run(query, key, value, gradient):
        out, pullback = jax.vjp(function, query, key, value)
        return out, *pullback(gradient)

    return jax.jit(run)


def of_kernel(kernel):
    def run(query, key, value, gradient):
        out, lse = kernel.forward(query, key, value)
        return out, *kernel.backward(query, key, value, out, lse, gradient)

    return jax.jit(run)


def exact(arrays):
    """Return output and gradients of plain attention for `arrays`, computed in float32."""
    return with_gradients(plain)(*(x.astype(jnp.float32) for x in arrays))


def furthest(ours, theirs, order=np.inf):
    """Return the largest relative difference of any pair of arrays, by default in the maximum norm."""
    pairs = [
        (np.ravel(x).astype(np.float64), np.ravel(y).astype(np.float64)) for x, y in zip(ours, theirs, strict=True)
    ]
    return max(np.linalg.norm(x - y, order) / np.linalg.norm(y, order) for x, y in pairs)


@pytest.mark.parametrize("keys", [5, 513])
@pytest.mark.parametrize("queries", [1, 7, 513, 1031])
def test_attention_in_chunks_is_exact(queries, keys):
    arrays = draw(queries, keys)
    assert furthest(with_gradients(attention)(*arrays), exact(arrays)) < 3e-6


@pytest.mark.parametrize("queries", [7, 1031])
def test_bfloat16_is_rounded_in_products_only(queries):
    """The relative error is 0.0027; a softmax in bfloat16 would make it larger than 0.006."""
    arrays = draw(queries, 513, dtype=jnp.bfloat16)
    ours = with_gradients(attention)(*arrays)
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    assert furthest(ours, exact(arrays), order=2) < 0.004


def test_scores_of_any_size_are_finite():
    query, key, value, gradient = draw(200, 40)
    arrays = (1e3 * query, 1e3 * key, value, gradient)
    ours = with_gradients(attention)(*arrays)
    assert all(np.isfinite(x).all() for x in ours)
    assert furthest(ours[:1], exact(arrays)[:1]) < 1e-3


def test_two_blocks_of_keys_combine_to_the_whole():
    """A ring of devices does this: `lse` combines the outputs, and each block's gradients use the combined `lse`."""
    query, key, value, gradient = draw(150, 90)
    parts = [(key[:, :30], value[:, :30]), (key[:, 30:], value[:, 30:])]
    outs, lses = zip(*(CHUNKED.forward(query, *part) for part in parts), strict=True)
    lse = jnp.logaddexp(*lses)
    shares = (jnp.exp(part - lse).transpose(0, 2, 1)[..., None] for part in lses)
    out = sum(part * share for part, share in zip(outs, shares, strict=True))
    gradients = [CHUNKED.backward(query, *part, out, lse, gradient) for part in parts]
    dquery = gradients[0][0] + gradients[1][0]
    dkey, dvalue = (jnp.concatenate([part[i] for part in gradients], axis=1) for i in (1, 2))
    assert furthest((out, dquery, dkey, dvalue), exact((query, key, value, gradient))) < 3e-6


@pytest.mark.parametrize(("queries", "keys", "width"), [(130, 200, 16), (1100, 1030, 128), (7, 128, 16)])
def test_splash_is_exact(queries, keys, width):
    """`lse` is exact too, also where the last block extends beyond the keys (200 of 256, 1030 of 1536).

    Heads of width 128 stay side by side, in one row; other heads are transposed, and have rows of their own.
    """
    arrays = draw(queries, keys, width=width)
    assert furthest(of_kernel(INTERPRETED)(*arrays), exact(arrays)) < 3e-6
    assert furthest([INTERPRETED.forward(*arrays[:3])[1]], [CHUNKED.forward(*arrays[:3])[1]]) < 3e-6


def test_splash_in_bfloat16():
    """The gradients of the queries are summed over blocks of keys in float32."""
    arrays = draw(130, 1030, width=16, dtype=jnp.bfloat16)
    ours = of_kernel(INTERPRETED)(*arrays)
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    assert furthest(ours, exact(arrays), order=2) < 0.005


def test_splash_takes_an_lse_over_more_keys():
    """A ring of devices does this: the gradients of a part of the keys need the `lse` over all of them."""
    query, key, value, gradient = draw(130, 200, width=16)
    out, lse = INTERPRETED.forward(query, key, value)
    for part in (slice(0, 120), slice(120, 200)):
        arrays = (query, key[:, part], value[:, part], out, lse, gradient)
        assert furthest(INTERPRETED.backward(*arrays), CHUNKED.backward(*arrays)) < 3e-6


def test_the_cores_of_a_chip_share_the_heads():
    """v4 and v5p have two cores per chip. The interpreter splits the parallel part of a grid over them."""
    heads = {0: set(), 1: set()}

    def record(token, point, core):
        heads[int(core)].add(int(point[0]))
        return token

    two = pltpu.InterpretParams(num_cores_or_threads=2, random_seed=0, grid_point_recorder=record)
    arrays = draw(1030, 600, batch=1, heads=2)
    ours = of_kernel(Kernel(*(partial(function, interpret=two) for function in SPLASH)))(*arrays)
    assert furthest(ours, exact(arrays)) < 3e-6
    assert (heads[0] | heads[1], heads[0] & heads[1]) == ({0, 1}, set())


def test_scan_checkpoint_vmap_and_jit():
    """A loss over layers under all transformations at once equals plain attention without them."""
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16, 16)) / 4, jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 140, 16)), jnp.float32)

    def layer(attend, x, kernels):
        query, key, value = (jnp.reshape(x @ kernel, (1, 140, 2, 8)) for kernel in kernels)
        return x + jnp.reshape(attend(query, key, value), x.shape)

    def ours(weights, x):
        body = jax.checkpoint(lambda x, kernels: (layer(attention, x, kernels), None))
        return jnp.sum(jax.lax.scan(body, x, weights)[0] ** 2)

    def theirs(weights, x):
        return jnp.sum(layer(plain, layer(plain, x, weights[0]), weights[1]) ** 2)

    mapped = jax.jit(jax.vmap(jax.grad(ours), in_axes=(None, 0)))(weights, x)
    assert furthest([mapped], [jnp.stack([jax.grad(theirs)(weights, one) for one in x])]) < 3e-6


@pytest.mark.parametrize(("saved", "runs"), [((), 3), ((ATTENTION_OUTPUT,), 2)])
def test_a_remat_policy_can_save_the_output(saved, runs):
    """The kernels run forward, backward, and forward once more unless `out` and `lse` are saved."""
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    @partial(jax.checkpoint, policy=policy)
    def layer(x):
        return jnp.sum(attention(*(jnp.sin(x) for _ in range(3))) ** 2)

    assert str(jax.make_jaxpr(jax.grad(layer))(jnp.ones((1, 300, 2, 8)))).count("platform_index") == runs


@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_linearly(backward, monkeypatch):
    """Each doubling of the length adds at most twice the temporary memory that the previous doubling added.

    XLA does not count allocations inside CPU kernels, so the program must not contain an S x S array either.
    """
    monkeypatch.setattr(chunked, "SCORES", 1)  # one head at a time, whatever the length
    function = with_gradients(attention) if backward else jax.jit(attention)

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        lowered = function.lower(*(x,) * (4 if backward else 3))
        assert f"{length}x{length}" not in lowered.as_text()
        return lowered.compile().memory_analysis().temp_size_in_bytes

    first, second, third = (temporary(length) for length in (1024, 2048, 4096))
    assert third - second < 2.1 * (second - first)


# Batch over 4 devices and heads over 2: prints the collectives of both passes, and whether the results stay split.
ON_A_MESH = r"""
import re, sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tfm_jax.wan.attention import attention

mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
sharding = NamedSharding(mesh, PartitionSpec("batch", None, "heads"))
arrays = [jax.ShapeDtypeStruct((4, n, 2, 8), jnp.float32, sharding=sharding) for n in (300, 40, 40, 300)]
run = jax.jit(lambda q, k, v, g: (lambda out, pullback: (out, *pullback(g)))(*jax.vjp(attention, q, k, v)))
compiled = run.lower(*arrays).compile()
print(re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", compiled.as_text()))
print(all(sharding.is_equivalent_to(out, 4) for out in compiled.output_shardings))
"""


def test_batch_and_heads_split_without_communication():
    out = subprocess.run(
        [sys.executable, "-c", ON_A_MESH],
        env=virtual_devices.environment(8),
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split("\n")[:2] == ["[]", "True"]


def lowered_for_cuda(function, queries, keys, width, dtype):
    arrays = [jax.ShapeDtypeStruct((2, n, 4, width), dtype) for n in (queries, keys, keys, queries)]
    return with_gradients(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def cudnn_calls(text):
    """Return the calls to cuDNN in a program with all their settings, but without the names of their operands."""
    calls = [line for line in text.splitlines() if "custom_call @__cudnn" in line]
    return [re.sub(r"%\w+(:\d+)?(#\d+)?", "%", call).strip() for call in calls]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_cudnn_calls_are_those_of_jax(monkeypatch, dtype):
    monkeypatch.setattr(cudnn.stablehlo, "check_cudnn_version", lambda: 91300)  # JAX requires cuDNN to trace its own
    theirs = partial(jax.nn.dot_product_attention, implementation="cudnn")
    calls = cudnn_calls(lowered_for_cuda(attention, 130, 78, 64, dtype))
    assert len(calls) == 2
    assert calls == cudnn_calls(lowered_for_cuda(theirs, 130, 78, 64, dtype))


@pytest.mark.parametrize(
    ("queries", "keys", "width", "dtype"),
    [
        (130, 78, 64, jnp.float32),
        (130, 78, 136, jnp.bfloat16),
        (130, 78, 12, jnp.bfloat16),
        (131, 78, 64, jnp.bfloat16),
        (130, 77, 64, jnp.bfloat16),
    ],
)
def test_chunks_replace_cudnn_where_it_does_not_support_the_shapes(queries, keys, width, dtype):
    text = lowered_for_cuda(attention, queries, keys, width, dtype)
    assert "cudnn" not in text
    assert "stablehlo.exponential" in text


@pytest.mark.parametrize(("platform", "calls"), [("cpu", set()), ("rocm", set()), ("tpu", {"tpu_custom_call"})])
def test_a_program_contains_no_kernel_of_another_platform(platform, calls):
    """The branches of all platforms are traced; lowering keeps one."""
    arrays = [jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)] * 4
    text = with_gradients(attention).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    assert set(re.findall(r"custom_call @(\w+)", text)) == calls


def test_tracing_for_a_gpu_needs_no_gpu_and_no_cudnn(monkeypatch):
    def unavailable(*args):
        raise AssertionError("looked for a device")

    for name in ("check_cudnn_version", "check_compute_capability", "is_cuda_compute_capability_equal"):
        monkeypatch.setattr(cudnn.stablehlo, name, unavailable)
    assert len(cudnn_calls(lowered_for_cuda(attention, 130, 78, 64, jnp.bfloat16))) == 2


def compile_for_tpu(monkeypatch, topology, queries, keys):
    """Compile attention with its gradients. libtpu, which the extra `test` installs, needs no TPU for this."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = NamedSharding(Mesh(np.array([chip]), ("chip",)), PartitionSpec())
    lengths = (queries, keys, keys, queries)
    arrays = [jax.ShapeDtypeStruct((1, n, 12, 128), jnp.bfloat16, sharding=sharding) for n in lengths]
    return with_gradients(attention).lower(*arrays).compile()


def tpu_kernels(text):
    """Return the code of each Pallas kernel in a compiled program, as the compiler received it."""
    bodies = re.findall(r'custom_call_target="tpu_custom_call".*?"body":"([^"]*)"', text)
    return [base64.b64decode(body) for body in bodies]


@pytest.mark.parametrize(
    ("topology", "queries", "keys"), [("v5e:2x2", 1560, 512), ("v5p:2x2x1", 520, 520), ("v6e:2x4", 32760, 32760)]
)
def test_a_program_compiled_for_tpu_runs_splash(monkeypatch, topology, queries, keys):
    compiled = compile_for_tpu(monkeypatch, topology, queries, keys)
    kernels = tpu_kernels(compiled.as_text())
    assert len(kernels) == 2
    # On chips with two cores (v5p), the compiler splits only what is declared parallel: the heads.
    assert all(b"dimension_semantics<parallel>" in kernel for kernel in kernels)
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * queries * 128 * 20
