"""The three networks of Wan2.1, and access to their parameters by dotted path."""

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
    """Name of the network, and of its folder in the Diffusers layout and in ours."""
    architecture: type
    """Dataclass with the sizes of the network."""
    build: Callable[..., nnx.Module]
    """`build(config, rngs=..., dtype=...)` returns the module with random weights."""
    rows: Callable[[Any], list[names.Row]]
    """`rows(config)` lists the tensors of the network."""
    stem: str
    """Start of the names of the safetensors files in the Diffusers layout."""


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
    """Return the network with kernels in `dtype`, and with `jax.ShapeDtypeStruct` in place of arrays."""
    return nnx.eval_shape(lambda: component.build(config, rngs=nnx.Rngs(0), dtype=dtype))


def abstract_parameters(component: Component, config: Any, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Map the dotted path of each parameter to its shape and dtype, for a network with kernels in `dtype`."""
    parameters = named_parameters(abstract_model(component, config, dtype))
    return {name: variable.get_value() for name, variable in parameters.items()}


def named_parameters(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Map dotted paths, such as `blocks.ffn.up.kernel`, to variables. Calling `set_value` on one changes `module`."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}
