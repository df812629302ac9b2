"""The three networks of Wan2.1, and their parameters by dotted path."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike

from tfm_jax.wan import names
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer
from tfm_jax.wan.vae import VaeConfig, WanVae


class Component(NamedTuple):
    """One of the three networks, independent of layout."""

    name: str
    """Also the name of its folder in the Diffusers layout."""
    architecture: type
    """Dataclass of its sizes."""
    build: Callable[..., nnx.Module]
    """`build(config, rngs=..., dtype=...)` returns the module with random weights."""
    rows: Callable[[Any], list[names.Row]]
    """`rows(config)` lists its tensors."""
    stem: str
    """Stem of its safetensors files in the Diffusers layout."""


TRANSFORMER = Component(
    "transformer",
    TransformerConfig,
    WanTransformer,
    lambda config: names.transformer_rows(config.layers),
    "diffusion_pytorch_model",
)
VAE = Component("vae", VaeConfig, WanVae, names.vae_rows, "diffusion_pytorch_model")
TEXT_ENCODER = Component(
    "text_encoder",
    TextEncoderConfig,
    UMT5Encoder,
    lambda config: names.text_encoder_rows(config.layers),
    "model",
)
COMPONENTS = (TRANSFORMER, VAE, TEXT_ENCODER)


def abstract_model(component: Component, config: Any, dtype: DTypeLike) -> nnx.Module:
    """The network with `jax.ShapeDtypeStruct` in place of arrays. Its kernels are in `dtype`."""
    return nnx.eval_shape(lambda: component.build(config, rngs=nnx.Rngs(0), dtype=dtype))


def abstract_parameters(component: Component, config: Any, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path -> shape and dtype of every parameter of a network whose kernels are in `dtype`."""
    parameters = named_parameters(abstract_model(component, config, dtype))
    return {name: variable.get_value() for name, variable in parameters.items()}


def named_parameters(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Dotted path, such as `blocks.ffn.up.kernel` -> variable of every parameter. `set_value` changes `module`."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}
