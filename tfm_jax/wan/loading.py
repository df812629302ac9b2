"""Directories of weights, in any layout -> networks, placed on the devices of a mesh tensor by tensor."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from tfm_jax.config import ModelConfig
from tfm_jax.errors import InputError
from tfm_jax.sharding import one_device_mesh, shardings
from tfm_jax.wan import layouts
from tfm_jax.wan.layouts import Source
from tfm_jax.wan.names import Row
from tfm_jax.wan.tensors import copy_into
from tfm_jax.wan.text_encoder import UMT5Encoder
from tfm_jax.wan.tokenizer import Tokenizer
from tfm_jax.wan.transformer import WanTransformer
from tfm_jax.wan.vae import WanVae


def load_transformer(path: str | Path, dtype: DTypeLike = jnp.bfloat16, mesh: Mesh | None = None) -> WanTransformer:
    """The diffusion transformer under `path`: a callable (latents, timestep `[b]` in 0..1000, text) -> velocity.

    Args:
        path: a directory in any supported layout (`tfm_jax.wan.layouts`), of the whole model or of this network.
        dtype: of kernels and computation; norms, modulation and time embedding are float32.
        mesh: the devices to spread the parameters over, as `tfm_jax.sharding.RULES` say; None is the first device.

    Raises:
        InputError: a tensor is missing, extra, misshapen or not finite, or the files are not a Wan2.1-T2V model.
    """
    return _load(layouts.find(Path(path), layouts.TRANSFORMER), dtype, mesh)


def load_base(model: ModelConfig, mesh: Mesh | None = None) -> WanTransformer:
    """The transformer that a configuration names, in its dtype.

    Raises:
        InputError: as `load_transformer` and `find_base`.
    """
    return _load(find_base(model), model.dtype, mesh)


def find_base(model: ModelConfig) -> Source:
    """The transformer that a configuration names, not yet read.

    Raises:
        InputError: it is not there, or of another size than the configuration is for.
    """
    source = layouts.find(model.path, layouts.TRANSFORMER)
    for field in ("dim", "ffn_dim", "heads", "layers"):
        have, want = getattr(source.config, field), getattr(model, field)
        if have != want:
            raise InputError(
                f"{source.place}: weights of a model with {field} {have}; the configuration is for model.{field}={want}"
            )
    return source


def load_vae(path: str | Path, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> WanVae:
    """The video autoencoder under `path`: `encode(video [b t h w 3] in -1..1)` -> normalised latents, and `decode`.

    Arguments and errors as in `load_transformer`.
    """
    return _load(layouts.find(Path(path), layouts.VAE), dtype, mesh)


def load_text_encoder(path: str | Path, dtype: DTypeLike = jnp.bfloat16, mesh: Mesh | None = None) -> UMT5Encoder:
    """The umT5 encoder under `path`: a callable (ids `[b l]`, mask `[b l]`) -> embeddings `[b l d]`.

    Arguments and errors as in `load_transformer`.
    """
    return _load(layouts.find(Path(path), layouts.TEXT_ENCODER), dtype, mesh)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer under `path`: `tokenizer/` (Diffusers layout) or `google/umt5-xxl/` (original layout).

    Raises:
        InputError: neither is there.
    """
    return Tokenizer(Path(path))


def _load(source: Source, dtype: DTypeLike, mesh: Mesh | None) -> Any:
    component, config = source.component, source.config
    rows = component.rows(config)
    module = layouts.abstract(component, config, dtype)
    flat = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}
    shapes = {name: variable.shape for name, variable in flat.items()}
    layouts.check_tensors(source.place, source.tensors, layouts.expected_tensors(source.layout, rows, shapes))

    rows_of = defaultdict(list)
    for row in rows:
        rows_of[row.ours].append(row)
    where = dict(zip(flat, _placements(flat, mesh or one_device_mesh()), strict=True))
    for name, variable in flat.items():
        value = _assemble(source, rows_of[name], variable.get_value(), where[name])
        if not bool(_finite(value)):
            raise InputError(f"{source.place}: {name} has a NaN or infinite value")
        variable.set_value(value)
    return module


def _placements(flat: dict[str, nnx.Variable], mesh: Mesh) -> list[NamedSharding]:
    return [variable.get_value() for variable in shardings(list(flat.values()), mesh)]


def _assemble(source: Source, rows: list[Row], like: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    """One parameter, stacked from the rows of its layers; every device is given its own part and no more is read."""

    def part(index: Any) -> np.ndarray:
        if rows[0].layer is None:
            return np.ascontiguousarray(source.read(rows[0], index), like.dtype)
        layers = rows[index[0]]
        shape = [len(range(*piece.indices(length))) for piece, length in zip(index, like.shape, strict=True)]
        out = np.empty(shape, like.dtype)
        for number, row in enumerate(layers):
            copy_into(out[number], source.read(row, index[1:]))
        return out

    return jax.make_array_from_callback(like.shape, sharding, part)


@jax.jit
def _finite(x: Array) -> Bool[Array, ""]:
    return jnp.isfinite(x).all()
