"""TPUs and GPUs multiply float32 as float32: the programs lowered for them ask for it.

A CPU multiplies float32 at full precision whatever the setting, so results on a CPU cannot show a difference. A program
can be lowered for a platform without its hardware.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.lax import Precision

from tfm_jax.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from tfm_jax.data.batches import Batch
from tfm_jax.lora.adapters import attach_lora, split_lora
from tfm_jax.objective.losses import OBJECTIVES
from tfm_jax.precision import precision_of
from tfm_jax.sampling.loop import guided_velocity
from tfm_jax.sharding import one_device_mesh, shardings
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.train.step import TrainState, make_step
from tfm_jax.wan.components import TEXT_ENCODER, TRANSFORMER, VAE, abstract_model
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.transformer import TransformerConfig
from tfm_jax.wan.vae import VaeConfig

CONFIGS = {
    TRANSFORMER: TransformerConfig(dim=32, ffn_dim=32, heads=2, layers=1, text_dim=8, freq_dim=8),
    TEXT_ENCODER: TextEncoderConfig(vocab_size=16, dim=8, heads=2, head_dim=4, ffn_dim=16, layers=1),
    VAE: VaeConfig(base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)),
}
LATENTS, TEXT, PIXELS = (1, 2, 4, 4, 16), (1, 8, 8), (1, 5, 16, 16, 3)
PLATFORMS = ("tpu", "cuda")


class Product(NamedTuple):
    """A matrix product or a convolution of a lowered program."""

    dtypes: tuple[str, ...]
    precision: tuple[str, ...]


def operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from operations(inner.operation)


def multiplied(value: Any) -> str:
    """The dtype of an operand. A float32 operand that was just converted from bfloat16 counts as bfloat16."""
    types = [str(value.type.element_type)]
    while getattr(value.owner, "name", "") in ("stablehlo.convert", "stablehlo.transpose", "stablehlo.reshape"):
        value = value.owner.operands[0]
        types.append(str(value.type.element_type))
    return "bf16" if "bf16" in types else types[0]


@functools.cache
def products(traced: jax.stages.Traced, platform: str) -> list[Product]:
    module = traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")
    return [
        Product(
            tuple(multiplied(x) for x in operation.operands),
            tuple(re.findall(r"precision (\w+)", str(operation.attributes["precision_config"]))),
        )
        for operation in operations(module.operation)
        if operation.name in ("stablehlo.dot_general", "stablehlo.convolution")
    ]


def check(found: list[Product]) -> None:
    """Check the rule: HIGHEST if any operand is float32, DEFAULT if all are bfloat16."""
    assert found
    for product in found:
        assert set(product.precision) == {"HIGHEST" if "f32" in product.dtypes else "DEFAULT"}, product


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def network(component, dtype="float32"):
    return abstract_model(component, CONFIGS[component], jnp.dtype(dtype))


@functools.cache
def training_step(dtype: str, kind: str = "tfm") -> jax.stages.Traced:
    model: Any = network(TRANSFORMER, dtype)
    attach_lora(model, LoraConfig(rank=2))
    graph, lora, frozen = split_lora(model)
    optimizer = make_optimizer(OptimizerConfig(), 1)
    state = TrainState(integers(), integers(), lora, jax.eval_shape(optimizer.init, lora))
    placement = shardings(state, one_device_mesh())
    step: Any = make_step(graph, optimizer, ObjectiveConfig(kind=kind), 0, placement)
    return step.trace(state, frozen, Batch(floats(*LATENTS), floats(*TEXT)))


@functools.cache
def sampling(dtype: str) -> jax.stages.Traced:
    args = (network(TRANSFORMER, dtype), floats(*LATENTS), floats(), floats(*TEXT), floats(*TEXT))
    return guided_velocity.trace(*args, guidance=5.0)


@functools.cache
def encoding_text(dtype: str) -> jax.stages.Traced:
    return jax.jit(lambda model, *args: model(*args)).trace(
        network(TEXT_ENCODER, dtype), integers(1, 8), integers(1, 8)
    )


@functools.cache
def encoding(dtype: str) -> jax.stages.Traced:
    return jax.jit(lambda vae, video: vae.encode(video)).trace(network(VAE, dtype), floats(*PIXELS))


@functools.cache
def decoding(dtype: str) -> jax.stages.Traced:
    return jax.jit(lambda vae, latents: vae.decode(latents)).trace(network(VAE, dtype), floats(*LATENTS))


PROGRAMS = (training_step, sampling, encoding_text, encoding, decoding)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_programs(program, dtype, platform):
    found = products(program(dtype), platform)
    check(found)
    assert any("bf16" in product.dtypes for product in found) == (dtype == "bfloat16")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES if kind != "tfm"])
def test_training_with_every_objective(kind, platform):
    check(products(training_step("float32", kind), platform))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("program", [training_step, sampling])
def test_the_time_embedding_is_float32_in_a_bfloat16_model(program, platform):
    found = products(program("bfloat16"), platform)
    assert found.count(Product(("f32", "f32"), ("HIGHEST", "HIGHEST"))) == 3


def loss_of_transformer(model, latents, time, text):
    return jnp.sum(model(latents, time, text))


def loss_of_text_encoder(model, ids, mask):
    return jnp.sum(model(ids, mask))


def loss_of_autoencoder(vae, video):
    return jnp.sum(vae.decode(vae.encode(video)))


@functools.cache
def forward_and_gradient(loss, component, args) -> tuple[jax.stages.Traced, jax.stages.Traced]:
    graph, weights = nnx.split(network(component))

    def of_weights(weights, *args):
        return loss(nnx.merge(graph, weights), *args)

    return jax.jit(of_weights).trace(weights, *args), jax.jit(jax.value_and_grad(of_weights)).trace(weights, *args)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("loss", "component", "args"),
    [
        (loss_of_transformer, TRANSFORMER, (floats(*LATENTS), floats(1), floats(*TEXT))),
        (loss_of_text_encoder, TEXT_ENCODER, (integers(1, 8), integers(1, 8))),
        (loss_of_autoencoder, VAE, (floats(*PIXELS),)),
    ],
)
def test_gradients_of_all_weights(loss, component, args, platform):
    """Pretraining trains all weights in float32. Every product adds at least one more to the backward pass."""
    forward, both = (products(traced, platform) for traced in forward_and_gradient(loss, component, args))
    check(both)
    assert len(both) >= 2 * len(forward)


def test_no_kernel_for_tpus_gets_float32():
    """A kernel sets the precision of its products itself."""
    texts = {
        dtype: training_step(dtype).lower(lowering_platforms=("tpu",)).as_text() for dtype in ("float32", "bfloat16")
    }
    assert "tpu_custom_call" not in texts["float32"]
    assert "tpu_custom_call" in texts["bfloat16"]


@pytest.mark.parametrize(
    ("dtypes", "precision"),
    [
        (("float32", "float32"), Precision.HIGHEST),
        (("bfloat16", "bfloat16"), Precision.DEFAULT),
        (("float16", "float16"), Precision.DEFAULT),
        (("bfloat16", "float32"), Precision.HIGHEST),
    ],
)
def test_precision_of_operands(dtypes, precision):
    assert precision_of(*(jnp.zeros(1, dtype) for dtype in dtypes)) == precision
