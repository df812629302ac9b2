"""Directories of weights, in any layout -> networks, placed on the devices of a mesh tensor by tensor."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Shaped

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
        InputError: neither is there, or its files are damaged.
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
    finite = {}
    for name, variable in flat.items():
        value = _assemble(source, rows_of[name], variable.get_value(), where[name])
        finite[name] = _finite(value)
        variable.set_value(value)
    for name, all_finite in jax.device_get(finite).items():  # one wait for all, not one for each parameter
        if not all_finite:
            raise InputError(_not_finite(source, rows_of[name], flat[name].get_value().dtype))
    return module


def _not_finite(source: Source, rows: list[Row], dtype: DTypeLike) -> str:
    """Names the tensor that gave a parameter values that are not finite."""
    for row in rows:
        with np.errstate(over="ignore"):
            if not np.isfinite(source.read(row).astype(dtype)).all():
                return source.not_finite(row)
    raise AssertionError(f"{source.place}: {rows[0].ours} was read differently the second time")


def _placements(flat: dict[str, nnx.Variable], mesh: Mesh) -> list[NamedSharding]:
    return [variable.get_value() for variable in shardings(list(flat.values()), mesh)]


def _assemble(source: Source, rows: list[Row], like: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    """One parameter, stacked from the rows of its layers; every process reads what its devices hold, once."""
    parts: dict[tuple, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = tuple(piece.indices(length) for piece, length in zip(index, like.shape, strict=True))
        if key not in parts:
            parts[key] = _read(source, rows, index, [len(range(*piece)) for piece in key], like.dtype)
        return parts[key]

    value = jax.make_array_from_callback(like.shape, _reading(source, rows[0], like.shape, sharding), part)
    return value if value.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(value)


def _read(
    source: Source, rows: list[Row], index: tuple[slice, ...], shape: list[int], dtype: DTypeLike
) -> Shaped[np.ndarray, "..."]:
    if rows[0].layer is None:
        return np.ascontiguousarray(source.read(rows[0], index), dtype)
    out = np.empty(shape, dtype)
    for number, row in enumerate(rows[index[0]]):
        copy_into(out[number], source.read(row, index[1:]))
    return out


def _reading(source: Source, row: Row, shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """How processes share the reading of a parameter: by the axis that varies slowest in the file, where that divides.

    A cut along another axis is many pieces shorter than a page, for which a disk delivers the whole file. The devices
    exchange the parts afterwards.
    """
    if sharding.is_fully_addressable:
        return sharding
    split = [name for part in sharding.spec for name in ((part,) if isinstance(part, str) else part or ())]
    axis = source.outermost(row) + (row.layer is not None)
    if shape[axis] % math.prod(sharding.mesh.shape[name] for name in split):
        return sharding
    spec = [tuple(split) if number == axis else None for number in range(len(shape))]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


@jax.jit
def _finite(x: Array) -> Bool[Array, ""]:
    return jnp.isfinite(x).all()
