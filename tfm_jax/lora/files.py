"""LoRA files for Wan2.1: write any of the four dialects that other programs load, and read all of them.

A program loads all modules of a file or none of them; if it loads none, it often prints only a warning. Which program
loads which dialect was found by running the loaders:

    dialect      key of an A factor                                          DiffSynth  diffusers  ComfyUI
    comfy        diffusion_model.blocks.0.self_attn.q.lora_A.weight          all        all        all
    diffsynth    blocks.0.self_attn.q.lora_A.default.weight                  all        none       none
    diffusers    transformer.blocks.0.attn1.to_q.lora_A.weight               none       all        none
    kohya        lora_unet_blocks_0_self_attn_q.lora_down.weight             none       all        all

A loader changes each weight W to W + alpha / rank * B A. The dialects also differ in where they store alpha. Some
loaders ignore alpha, so `comfy` and `diffsynth` files have no alpha, and the scale is multiplied into the factors.
`kohya` files have a tensor `.alpha` in every module. `diffusers` files have alpha in their metadata if it is not the
rank.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple, TypeVar, get_args

import ml_dtypes
import numpy as np
import pydantic
from jaxtyping import Float32
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from tfm_jax.errors import InputError
from tfm_jax.files import replacing
from tfm_jax.inputs import parse_json, read_json, short_repr, validate
from tfm_jax.wan.names import BLOCK_LINEARS, LORA_TARGETS, BlockLinear
from tfm_jax.wan.tensors import LazyTensor, open_safetensors, safetensors_metadata

Dialect = Literal["comfy", "diffsynth", "diffusers", "kohya"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

Number = TypeVar("Number", int, float)


class Adapter(NamedTuple):
    """The factors for one linear layer, in torch's layout: its weight `[out, in]` changes by alpha / rank * B A."""

    a: Float32[np.ndarray, "rank in"]
    b: Float32[np.ndarray, "out rank"]


class Lora(NamedTuple):
    """All adapters of a model."""

    adapters: dict[BlockLinear, Adapter]
    rank: int
    alpha: float
    metadata: Mapping[str, str] = MappingProxyType({})
    """Metadata of the file that the adapters were read from, such as the base model and the number of steps."""


class _Keys(NamedTuple):
    """How a dialect names the module of a `BlockLinear` (as a format string) and the two factors in the module."""

    module: str
    a: str
    b: str


_DIALECT_KEYS: dict[Dialect, _Keys] = {
    "comfy": _Keys("diffusion_model.{0.original}", "lora_A.weight", "lora_B.weight"),
    "diffsynth": _Keys("{0.original}", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": _Keys("transformer.{0.diffusers}", "lora_A.weight", "lora_B.weight"),
    "kohya": _Keys("lora_unet_{0.kohya}", "lora_down.weight", "lora_up.weight"),
}

_PEFT_METADATA = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_lora(
    path: Path,
    lora: Lora,
    dialect: Dialect = "comfy",
    dtype: DTypeLike = ml_dtypes.bfloat16,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write `lora` to `path`. On failure, an existing file stays as it was.

    `comfy` is the dialect to share, since ComfyUI, diffusers and DiffSynth all load it. `diffsynth`, which the TFM
    release writes, is for DiffSynth alone; `diffusers` is for diffusers alone; `kohya` is for musubi-tuner, ComfyUI and
    diffusers.

    Args:
        metadata: how the LoRA was made; added to the metadata of the file.

    Raises:
        InputError: `path` is a directory, a factor would not be finite in `dtype`, or the dialect is `kohya` and a
            linear layer of a block has no adapter.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a directory; expected the name of a file")
    if dialect == "kohya":
        _require_every_linear(path, lora)
    tensors = _tensors(lora, dialect, dtype)
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise InputError(f"{path}: {key} would not be finite in {value.dtype}; nothing was written")
    metadata = {**metadata, "format": "pt"}
    if dialect == "diffusers" and lora.alpha != lora.rank:
        metadata[_PEFT_METADATA] = json.dumps(_diffusers_config(lora))
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata)
        _sort_metadata(scratch)
        scratch.chmod(0o644)  # safetensors makes the file readable only by its owner


def _tensors(lora: Lora, dialect: Dialect, dtype: DTypeLike) -> dict[str, np.ndarray]:
    """Return the tensors of a file by key. A value that is too large for `dtype` becomes infinite."""
    factor = math.sqrt(lora.alpha / lora.rank) if dialect in ("comfy", "diffsynth") else 1.0
    keys = _DIALECT_KEYS[dialect]
    tensors: dict[str, np.ndarray] = {}
    for linear, adapter in lora.adapters.items():
        module = keys.module.format(linear)
        for key, value in ((keys.a, adapter.a), (keys.b, adapter.b)):
            with np.errstate(over="ignore"):
                # safetensors ignores the strides of an array, so a transposed view must be copied.
                tensors[f"{module}.{key}"] = np.array(value * np.float32(factor), dtype, order="C")
        if dialect == "kohya":
            tensors[f"{module}.alpha"] = np.array(lora.alpha, np.float32)
    return tensors


def _sort_metadata(file: Path) -> None:
    """Sort the metadata by key. safetensors writes it in random order, so equal content would give different files."""
    with open(file, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        stream.seek(8)
        stream.write(text.ljust(size))


def _require_every_linear(path: Path, lora: Lora) -> None:
    """Check what readers of `kohya` assume: that every block has an adapter on each of its ten linear layers."""
    for layer in range(max(linear.layer for linear in lora.adapters) + 1):
        for linear in (BlockLinear(layer, name) for name in BLOCK_LINEARS):
            if linear not in lora.adapters:
                raise InputError(
                    f"{path}: dialect kohya needs an adapter on every linear layer, but {linear} has none; "
                    f"train with lora.targets: [{', '.join(LORA_TARGETS)}], or choose another dialect"
                )


def _diffusers_config(lora: Lora) -> dict[str, object]:
    """Return the metadata from which `diffusers.loaders.WanLoraLoaderMixin` makes a `peft.LoraConfig`."""
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    modules = [linear.diffusers for linear in lora.adapters]
    config = {"r": lora.rank, "lora_alpha": alpha, "target_modules": modules}
    return {f"transformer.{field}": value for field, value in config.items()}


# --- Reading ---------------------------------------------------------------------------------------------------------

_KEY = re.compile(
    r"""(?: (?P<prefix> diffusion_model\. | pipe\.dit\. | transformer\. | base_model\.model\. )?
            blocks\.(?P<layer> 0|[1-9][0-9]{0,5} )\.(?P<name> .+? )
          | lora_unet_blocks_(?P<kohya_layer> 0|[1-9][0-9]{0,5} )_(?P<kohya_name> .+? ) )
        \.(?P<part> alpha | lora_(?: A | B | down | up )(?: \.default )?\.weight )""",
    re.VERBOSE,
)

_NAMES = {spelling: name for name, names in BLOCK_LINEARS.items() for spelling in (name, names.diffusers)}
_KOHYA_NAMES = {names.kohya: name for name, names in BLOCK_LINEARS.items()}
_PARTS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha"}

_Parts = dict[str, LazyTensor]
"""The tensors of one module by part: A, B, and alpha if the file has it."""


def read_lora(path: Path) -> Lora:
    """Read a LoRA file of any dialect. A file that cannot be read completely is refused.

    Keys may contain `.default`, and may call the factors `lora_A` and `lora_B` or `lora_down` and `lora_up`. The prefix
    may be `lora_unet_`, `diffusion_model.`, `pipe.dit.`, `transformer.`, `base_model.model.` or none.

    alpha comes from the `.alpha` tensors, from the metadata that diffusers writes, or from PEFT's `adapter_config.json`
    beside the file. Without any of these, alpha is the rank, as the loaders of such files assume.

    Raises:
        InputError: the file is not safetensors, or it has a key that does not belong to a Wan2.1-T2V LoRA (such as
            that of a layer that only I2V has), a factor without its counterpart, unequal ranks or alphas, `lora_unet_`
            keys without `.alpha`, or a value that is not finite.
    """
    tensors = open_safetensors(path)
    metadata = safetensors_metadata(path)
    modules = _modules(path, tensors)
    adapters = {linear: _adapter(path, linear, parts) for linear, parts in modules.items()}
    rank = _common(path, "rank", {linear: adapter.a.shape[0] for linear, adapter in adapters.items()})
    for factor in ("a", "b"):
        _check_same_shapes(path, factor, adapters)
    configured = _configured_alpha(path, tensors, metadata, rank)
    alpha = _alpha(path, tensors, modules, rank, configured)
    kept = {key: value for key, value in metadata.items() if key not in ("format", _PEFT_METADATA)}
    return Lora(adapters, rank, alpha, kept)


def _modules(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[BlockLinear, _Parts]:
    """Group the tensors by linear layer, in the order of the network, and by part. Every key must be recognised."""
    found: dict[BlockLinear, dict[str, str]] = {}
    unknown = []
    for key in tensors:
        parsed = _parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        linear, part = parsed
        keys = found.setdefault(linear, {})
        if part in keys:
            raise InputError(
                f"{path}: {short_repr(key)} and {short_repr(keys[part])} name the same factor; expected only one"
            )
        keys[part] = key
    if unknown or not found:
        example = f", but not {short_repr(unknown[0])}" if unknown else ""
        raise InputError(
            f"{path}: recognised {len(tensors) - len(unknown)} of {len(tensors)} keys{example}; "
            f"expected lora_A and lora_B on {', '.join(BLOCK_LINEARS)} of Wan2.1-T2V blocks"
        )
    whole = sum(keys.keys() >= {"A", "B"} for keys in found.values())
    ordered = sorted(found, key=lambda linear: (linear.layer, list(BLOCK_LINEARS).index(linear.name)))
    for linear in ordered:
        for part in ("A", "B"):
            if part not in found[linear]:
                raise InputError(
                    f"{path}: {linear} has no {part} factor, but {whole} of {len(found)} modules have both; "
                    "expected lora_A and lora_B (or lora_down and lora_up) for each"
                )
    return {linear: {part: tensors[key] for part, key in found[linear].items()} for linear in ordered}


def _parse_key(key: str) -> tuple[BlockLinear, str] | None:
    """Return the linear layer and the part (A, B or alpha) of a key, or None if a Wan2.1-T2V LoRA has no such key."""
    match = _KEY.fullmatch(key)
    if not match:
        return None
    if match["kohya_name"]:
        layer, name = match["kohya_layer"], _KOHYA_NAMES.get(match["kohya_name"])
    else:
        layer, name = match["layer"], _NAMES.get(match["name"])
    return (BlockLinear(int(layer), name), _PARTS[match["part"].split(".")[0]]) if name else None


def _adapter(path: Path, linear: BlockLinear, parts: _Parts) -> Adapter:
    a, b = parts["A"].shape, parts["B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
        raise InputError(f"{path}: {linear} has A {list(a)} and B {list(b)}; expected [rank, in] and [out, rank]")
    factors = []
    for part in ("A", "B"):
        value = np.asarray(parts[part].read(...), np.float32)
        if not np.isfinite(value).all():
            raise InputError(f"{path}: {part} factor of {linear} is not finite; expected finite numbers")
        factors.append(value)
    return Adapter(*factors)


def _check_same_shapes(path: Path, factor: Literal["a", "b"], adapters: Mapping[BlockLinear, Adapter]) -> None:
    """Check that the factor of each linear layer has the same shape in every block."""
    first: dict[str, BlockLinear] = {}
    for linear, adapter in adapters.items():
        shape = getattr(adapter, factor).shape
        other = first.setdefault(linear.name, linear)
        expected = getattr(adapters[other], factor).shape
        if shape != expected:
            raise InputError(
                f"{path}: {factor.upper()} of {linear} is {list(shape)}; expected {list(expected)}, as in {other}"
            )


def _alpha(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    modules: Mapping[BlockLinear, _Parts],
    rank: int,
    configured: float | None,
) -> float:
    """Return the alpha of a file: the value of its `.alpha` tensors, otherwise `configured`, otherwise the rank."""
    if not any("alpha" in parts for parts in modules.values()):
        if any(key.startswith("lora_unet_") for key in tensors):
            raise InputError(
                f"{path}: has lora_unet_ keys without .alpha, for which readers assume different defaults; "
                "expected .alpha in every module"
            )
        return float(rank) if configured is None else configured
    if configured is not None:
        raise InputError(
            f"{path}: has .alpha tensors, but its metadata or adapter_config.json also gives alpha {configured:g}; "
            "expected only one of them"
        )

    alphas = {}
    for linear, parts in modules.items():
        if "alpha" not in parts:
            raise InputError(f"{path}: {linear} has no .alpha, but other modules do; expected it in all or in none")
        if math.prod(parts["alpha"].shape) != 1:
            raise InputError(f"{path}: .alpha of {linear} has shape {list(parts['alpha'].shape)}; expected one number")
        alphas[linear] = float(parts["alpha"].read(...).item())
        if not 0 < alphas[linear] < math.inf:
            raise InputError(f"{path}: .alpha of {linear} is {alphas[linear]:g}; expected a positive number")
    return _common(path, "alpha", alphas)


def _common(path: Path, what: str, values: Mapping[BlockLinear, Number]) -> Number:
    """Return the value that all modules share, called `what` in the error message."""
    first, value = next(iter(values.items()))
    for linear, other in values.items():
        if other != value:
            raise InputError(
                f"{path}: {first} has {what} {value:g}, but {linear} has {other:g}; expected the same in all modules"
            )
    return value


def _configured_alpha(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], rank: int
) -> float | None:
    """Return alpha from the `peft.LoraConfig` in the metadata (from diffusers) or in adapter_config.json (from PEFT).

    The fields have the prefix `transformer.` if a pipeline of diffusers wrote them, and no prefix if a model did. If
    there is no such configuration, return None.
    """
    config_file = path.with_name("adapter_config.json")
    if _PEFT_METADATA in metadata:
        place = f"{path}: metadata {_PEFT_METADATA}"
        values = parse_json(metadata[_PEFT_METADATA], place)
    elif all(key.startswith(_PEFT_PREFIX) for key in tensors) and config_file.is_file():
        place, values = str(config_file), read_json(config_file)
    else:
        return None
    fields = {key.removeprefix("transformer."): value for key, value in values.items()}
    for field in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        if fields.get(field):
            raise InputError(f"{place}: {field} is {short_repr(fields[field])}; expected a plain LoRA without it")
    config = validate(_PeftConfig, fields, place)
    if config.r != rank:
        raise InputError(f"{place}: r is {config.r}; expected {rank}, the rank of the tensors")
    return config.lora_alpha


class _PeftConfig(pydantic.BaseModel):
    """The fields of a `peft.LoraConfig` that set the scale of the adapters."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    r: int
    lora_alpha: Annotated[float, pydantic.Field(gt=0, lt=1e30)]
