"""Load networks from directories of weights in any layout onto the devices of a mesh, one parameter at a time."""

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
from tfm_jax.wan.checks import check_source
from tfm_jax.wan.components import TEXT_ENCODER, TRANSFORMER, VAE, abstract_model, named_parameters
from tfm_jax.wan.names import Row
from tfm_jax.wan.quantization import quantize, quantize_linears
from tfm_jax.wan.sources import Change, Source, find_source, no_change
from tfm_jax.wan.tensors import copy_into
from tfm_jax.wan.text_encoder import UMT5Encoder
from tfm_jax.wan.tokenizer import Tokenizer
from tfm_jax.wan.transformer import WanTransformer
from tfm_jax.wan.vae import WanVae


def load_transformer(path: str | Path, dtype: DTypeLike = jnp.bfloat16, mesh: Mesh | None = None) -> WanTransformer:
    """Load the diffusion transformer, which maps (latents, timesteps in 0..1000, text) to velocities.

    Args:
        path: directory of the whole model or of this network alone, in any of the layouts of `tfm_jax.wan.sources`, or
            one safetensors file as ComfyUI has it.
        dtype: type of the weights and of the computation. Norms, modulation, time embedding and softmax are always
            float32.
        mesh: devices over which `tfm_jax.sharding.RULES` shards the parameters; None means the first device alone.

    Raises:
        InputError: the files are not those of a Wan2.1-T2V model; a tensor is missing, unexpected, misshapen or not
            finite; or the mesh does not divide a parameter evenly.
    """
    return _load(find_source(Path(path), TRANSFORMER), dtype, mesh)


def load_base(model: ModelConfig, mesh: Mesh | None = None, change: Change = no_change) -> WanTransformer:
    """Load the transformer that a configuration names, in the dtype of the configuration or quantised.

    Args:
        change: see `Source`. It is added before quantising.

    Raises:
        InputError: see `load_transformer` and `find_base`.
    """
    return _load(find_base(model)._replace(change=change), model.dtype, mesh, quantized=model.quantize is not None)


def find_base(model: ModelConfig) -> Source:
    """Find the transformer that a configuration names, without reading its weights.

    Raises:
        InputError: the transformer is not found, or its sizes differ from those of the configuration.
    """
    source = find_source(model.path, TRANSFORMER)
    for field in ("dim", "ffn_dim", "heads", "layers"):
        have, want = getattr(source.config, field), getattr(model, field)
        if have != want:
            raise InputError(
                f"{source.file}: the weights have {field} {have}; expected {want}, the configured model.{field}"
            )
    return source


def load_vae(path: str | Path, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> WanVae:
    """Load the video autoencoder, which encodes videos `[b t y x 3]` in -1..1 as normalised latents and decodes them.

    The arguments and errors are those of `load_transformer`.
    """
    return _load(find_source(Path(path), VAE), dtype, mesh)


def load_text_encoder(path: str | Path, dtype: DTypeLike = jnp.bfloat16, mesh: Mesh | None = None) -> UMT5Encoder:
    """Load the umT5 encoder, which maps token ids `[b l]` and their mask `[b l]` to embeddings `[b l d]`.

    The arguments and errors are those of `load_transformer`.
    """
    return _load(find_source(Path(path), TEXT_ENCODER), dtype, mesh)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of the model directory `path`, in any layout.

    Raises:
        InputError: the directory has no tokenizer, or its tokenizer is damaged or not umT5's.
    """
    return Tokenizer(Path(path))


def _load(source: Source, dtype: DTypeLike, mesh: Mesh | None, quantized: bool = False) -> Any:
    module: Any = abstract_model(source.component, source.config, dtype)
    check_source(source, {name: variable.get_value() for name, variable in named_parameters(module).items()})
    if quantized:
        module.blocks = nnx.eval_shape(quantize_linears, module.blocks)

    parameters = named_parameters(module)
    rows = defaultdict(list)
    for row in source.component.rows(source.config):
        rows[row.ours].append(row)
    where = dict(zip(parameters, _placements(parameters, mesh or one_device_mesh()), strict=True))
    finite = {}
    for name, variable in parameters.items():
        if name not in rows:
            continue  # the scales of a kernel, which come with the kernel
        like, scale = variable.get_value(), f"{name}_scale"
        if scale in parameters:
            value, checked = _assemble_quantized(source, rows[name], like, (where[name], where[scale]))
            parameters[scale].set_value(checked)
        else:
            value = checked = _assemble(source, rows[name], like, where[name])
        variable.set_value(value)
        finite[name] = _finite(checked)
    for name, all_finite in jax.device_get(finite).items():  # one transfer for all parameters instead of one for each
        if not all_finite:
            raise InputError(_not_finite(source, rows[name], parameters[name].get_value().dtype))
    return module


def _not_finite(source: Source, rows: list[Row], dtype: DTypeLike) -> str:
    """Return the error message for a parameter that is not finite. The message names the tensor in the files."""
    read_as = np.float32 if dtype == np.int8 else dtype
    for row in rows:
        with np.errstate(over="ignore"):
            if not np.isfinite(source.read(row).astype(read_as)).all():
                return source.not_finite(row)
    raise AssertionError(f"{source.file}: {rows[0].ours} was not finite when first read, but is now")


def _placements(parameters: dict[str, nnx.Variable], mesh: Mesh) -> list[NamedSharding]:
    return [variable.get_value() for variable in shardings(list(parameters.values()), mesh)]


def _assemble(source: Source, rows: list[Row], like: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    """Read a parameter and stack its layers. Every process reads only the parts for its devices, and each part once."""
    parts: dict[tuple, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = tuple(piece.indices(length) for piece, length in zip(index, like.shape, strict=True))
        if key not in parts:
            parts[key] = _read(source, rows, index, [len(range(*piece)) for piece in key], like.dtype)
        return parts[key]

    value = jax.make_array_from_callback(like.shape, _read_sharding(source, rows[0], like.shape, sharding), part)
    return value if value.sharding == sharding else jax.jit(_unchanged, out_shardings=sharding)(value)


def _unchanged(x: Array) -> Array:
    """Passed to `jit`, which compiles one function only once for each shape and sharding, unlike lambdas."""
    return x


def _assemble_quantized(
    source: Source, rows: list[Row], like: jax.ShapeDtypeStruct, where: tuple[NamedSharding, NamedSharding]
) -> tuple[jax.Array, jax.Array]:
    """Read a stacked kernel and quantise it. Only one layer at a time is in float32.

    Returns:
        The integers and the scales, sharded as `where` says.
    """
    layer, convert = jax.ShapeDtypeStruct((1, *like.shape[1:]), np.float32), jax.jit(quantize, out_shardings=where)
    layers = [convert(_assemble(source, [row], layer, where[0])) for row in rows]
    return jax.jit(_concatenate, out_shardings=where)(layers)


def _concatenate(layers: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    kernels, scales = zip(*layers, strict=True)
    return jnp.concatenate(kernels), jnp.concatenate(scales)


def _read(
    source: Source, rows: list[Row], index: tuple[slice, ...], shape: list[int], dtype: DTypeLike
) -> Shaped[np.ndarray, "..."]:
    if rows[0].layer is None:
        return np.ascontiguousarray(source.read(rows[0], index), dtype)
    out = np.empty(shape, dtype)
    for number, row in enumerate(rows[index[0]]):
        copy_into(out[number], source.read(row, index[1:]))
    return out


def _read_sharding(source: Source, row: Row, shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """Return the sharding in which the processes read a parameter; the devices exchange the parts afterwards.

    A single process reads the parameter in its final `sharding`. With several processes, the parts are cut along the
    axis that varies slowest in the file, if the number of parts divides the length of that axis. A part along any other
    axis consists of pieces shorter than a page of memory, so every process would read the whole file.
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
