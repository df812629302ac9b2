"""Kernels in int8: the integers and their scales, layers that use them, and loading them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.wan_reference import SIZES, reference_transformer, write_original
from safetensors.numpy import load_file, save_file

from tfm_jax.config import ModelConfig
from tfm_jax.errors import InputError
from tfm_jax.wan import load_base
from tfm_jax.wan.components import named_parameters
from tfm_jax.wan.layers import Linear
from tfm_jax.wan.quantization import quantize, quantize_linears

CONFIG = SIZES["small"]


def restored(kernel, scale) -> np.ndarray:
    return np.asarray(kernel, np.float32) * np.asarray(scale)[..., None, :]


def test_every_weight_becomes_the_nearest_step_of_its_channel():
    weight = np.random.default_rng(0).standard_normal((3, 50, 7)).astype(np.float32)
    weight[0, :, 1] *= 1e6  # one channel does not make the others coarser
    weight[1, :, 2] = 0
    kernel, scale = map(np.asarray, quantize(jnp.asarray(weight)))
    assert (kernel.dtype, scale.dtype) == (np.int8, np.float32)
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=1) / 127, rtol=1e-6)
    steps = np.where(scale > 0, scale, 1)[:, None]
    np.testing.assert_array_equal(kernel, np.round(weight / steps))
    assert (np.abs(kernel).max(axis=1) == np.where(scale > 0, 127, 0)).all()
    assert (np.abs(weight - restored(kernel, scale)) <= 0.501 * scale[:, None]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_scale_tells_whether_all_weights_are_finite(value):
    weight = np.ones((4, 3), np.float32)
    weight[2, 1] = value
    assert np.isfinite(quantize(jnp.asarray(weight))[1]).tolist() == [True, False, True]


def with_adapter(layer, dora):
    rng = np.random.default_rng(1)
    shapes = {"lora_a": (24, 4), "lora_b": (4, 10)} | ({"lora_magnitude": (10,)} if dora else {})
    for name, shape in shapes.items():
        value = jnp.asarray(rng.uniform(0.5, 1, shape), jnp.float32)
        setattr(layer, name, nnx.LoRAParam(value, axes=(None,) * len(shape)))
    layer.lora_scale = 0.5
    return layer


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_is_that_of_the_restored_kernel(dtype, tolerance, dora):
    """The output, and the gradients in the input and in the adapter."""
    layers = [with_adapter(Linear(24, 10, rngs=nnx.Rngs(0)), dora) for _ in range(2)]
    ours, plain = quantize_linears(layers[0]), layers[1]
    assert ours.kernel.dtype == jnp.int8
    plain.kernel.set_value(jnp.asarray(restored(ours.kernel[...], ours.kernel_scale[...])))
    rng = np.random.default_rng(2)
    x, weights = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((2, 5, 24), (2, 5, 10)))

    def run(layer):
        graph, adapter, frozen = nnx.split(layer, nnx.LoRAParam, ...)

        def loss(x, adapter):
            y = nnx.merge(graph, adapter, frozen)(x)
            return jnp.sum((y * weights).astype(jnp.float32)), y

        gradients, y = jax.grad(loss, (0, 1), has_aux=True)(x, adapter)
        return jax.tree.leaves((y, gradients))

    for found, expected in zip(run(ours), run(plain), strict=True):
        assert found.dtype == expected.dtype
        found, expected = np.float32(found), np.float32(expected)
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# --- Loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> ModelConfig:
    """A model in float32, in the Diffusers layout."""
    reference_transformer(CONFIG).save_pretrained(tmp_path / "model" / "transformer")
    sizes = {field: getattr(CONFIG, field) for field in ("dim", "ffn_dim", "heads", "layers")}
    return ModelConfig(path=tmp_path / "model", dtype="float32", **sizes)


def arrays(model: ModelConfig, **arguments) -> dict[str, np.ndarray]:
    module = load_base(model, **arguments)
    return {name: np.asarray(variable.get_value()) for name, variable in named_parameters(module).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, name)


def test_only_the_kernels_of_the_blocks_are_quantised(model, tmp_path):
    plain, ours = arrays(model), arrays(dataclasses.replace(model, quantize="int8"))
    scales = [name for name in ours if name not in plain]
    assert len(scales) == 10
    kernels = [name.removesuffix("_scale") for name in scales]
    assert all(name.startswith("blocks.") and name.endswith(".kernel") for name in kernels)
    for kernel, scale in zip(kernels, scales, strict=True):
        assert ours[kernel].dtype == np.int8
        assert (np.abs(restored(ours[kernel], ours[scale]) - plain[kernel]) <= 0.501 * ours[scale][:, None]).all()
    assert_same({n: x for n, x in ours.items() if n not in (*kernels, *scales)},
                {n: x for n, x in plain.items() if n not in kernels})  # fmt: skip

    # The integers come from the weights in the files, whatever the dtype of the computation and the layout.
    write_original(reference_transformer(CONFIG), CONFIG, tmp_path / "original")
    other = arrays(dataclasses.replace(model, path=tmp_path / "original", quantize="int8", dtype="bfloat16"))
    assert_same({n: other[n] for n in (*kernels, *scales)}, {n: ours[n] for n in (*kernels, *scales)})


def test_a_change_is_added_before_quantising(model):
    """As the differences of a LoRA in tfm-sample."""

    def change(row, read):
        return np.full(read().shape, 10, np.float32) if row.ours == "blocks.ffn.up.kernel" and row.layer == 1 else None

    quantized = dataclasses.replace(model, quantize="int8")
    ours, plain = arrays(quantized, change=change), arrays(quantized)
    name, scale = "blocks.ffn.up.kernel", "blocks.ffn.up.kernel_scale"
    weight = arrays(model)[name][1] + 10
    np.testing.assert_allclose(restored(ours[name], ours[scale])[1], weight, atol=0.501 * ours[scale][1].max())
    np.testing.assert_array_equal(ours[name][0], plain[name][0])


def test_a_weight_that_is_not_finite_is_refused(model):
    (file,) = (model.path / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["blocks.1.ffn.net.2.weight"][3, 4] = np.inf
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.net\.2\.weight has a NaN or infinite value"):
        load_base(dataclasses.replace(model, quantize="int8"))
