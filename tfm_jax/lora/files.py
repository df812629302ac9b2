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

A DoRA also sets the norms of the rows of the changed weight: its magnitudes. Only diffusers, through PEFT, computes
what was trained. DiffSynth has no DoRA, and ComfyUI divides by the norms of W instead of those of the changed weight
(Comfy-Org/ComfyUI#15458). A DoRA is therefore written in the dialect `diffusers` only, with tensors
`.lora_magnitude_vector`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from tfm_jax.errors import InputError
from tfm_jax.files import replacing
from tfm_jax.inputs import short_repr
from tfm_jax.lora import peft_config
from tfm_jax.lora.keys import (
    DIALECT_KEYS,
    Dialect,
    difference_key,
    is_dora_scale,
    network_order,
    parse_difference,
    parse_factor,
)
from tfm_jax.wan.checks import similar
from tfm_jax.wan.names import (
    BLOCK_LINEARS,
    LORA_TARGETS,
    BlockLinear,
    OuterLinear,
    TransformerLinear,
)
from tfm_jax.wan.tensors import LazyTensor, open_safetensors, safetensors_metadata


class Adapter(NamedTuple):
    """The factors for one linear layer, in torch's layout: its weight `[out, in]` changes by alpha / rank * B A."""

    a: Float32[np.ndarray, "rank in"]
    b: Float32[np.ndarray, "out rank"]


class Lora(NamedTuple):
    """All adapters of a model."""

    adapters: dict[TransformerLinear, Adapter]
    rank: int
    alpha: float
    metadata: Mapping[str, str] = MappingProxyType({})
    """Metadata of the file that the adapters were read from, such as the base model and the number of steps."""
    differences: Mapping[str, Float32[np.ndarray, "..."]] = MappingProxyType({})
    """Original name of a tensor -> what is added to it, in torch's layout. LoRAs that distil a model have these."""
    magnitudes: Mapping[TransformerLinear, Float32[np.ndarray, "out"]] = MappingProxyType({})
    """The norms that a DoRA gives to the rows of the weights of all linear layers with an adapter, after these have
    changed; empty for a plain LoRA."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


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
        InputError: `path` is a directory, a factor would not be finite in `dtype`, the dialect cannot store
            differences or a DoRA, or it is `kohya` and not exactly the linear layers of the blocks have adapters.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a directory; expected the name of a file")
    if lora.differences and dialect != "comfy":
        raise InputError(
            f"{path}: only dialect comfy stores differences of whole tensors, such as {next(iter(lora.differences))}; "
            "choose it, or merge the LoRA into the model"
        )
    if lora.magnitudes and not DIALECT_KEYS[dialect].magnitude:
        raise InputError(
            f"{path}: the programs that load dialect {dialect} do not apply a DoRA as it was trained; choose dialect "
            "diffusers, or merge the DoRA into the model"
        )
    if dialect == "kohya":
        _require_every_linear(path, lora)
    tensors = _tensors(lora, dialect, dtype)
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise InputError(f"{path}: {key} would not be finite in {value.dtype}; nothing was written")
    metadata = {**metadata, "format": "pt"}
    if dialect == "diffusers" and lora.alpha != lora.rank:
        modules = [linear.diffusers for linear in lora.adapters]
        metadata[peft_config.METADATA] = peft_config.to_metadata(
            lora.rank, float(lora.alpha), bool(lora.magnitudes), modules
        )
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata)
        _sort_metadata(scratch)
        scratch.chmod(0o644)  # safetensors makes the file readable only by its owner


def _tensors(lora: Lora, dialect: Dialect, dtype: DTypeLike) -> dict[str, np.ndarray]:
    """Return the tensors of a file by key. A value that is too large for `dtype` becomes infinite."""
    factor = math.sqrt(lora.scale) if dialect in ("comfy", "diffsynth") else 1.0
    keys = DIALECT_KEYS[dialect]
    tensors: dict[str, np.ndarray] = {}
    for linear, adapter in lora.adapters.items():
        for part, value in (("A", adapter.a), ("B", adapter.b)):
            with np.errstate(over="ignore"):
                # safetensors ignores the strides of an array, so a transposed view must be copied.
                tensors[keys.key(linear, part)] = np.array(value * np.float32(factor), dtype, order="C")
        if dialect == "kohya":
            tensors[keys.key(linear, "alpha")] = np.array(lora.alpha, np.float32)
    for linear, value in lora.magnitudes.items():
        # In fewer digits, the rounding of a magnitude would change the whole row of a weight.
        tensors[keys.key(linear, "magnitude")] = np.array(value, np.float32)
    for name, value in lora.differences.items():
        with np.errstate(over="ignore"):
            tensors[difference_key(name)] = np.array(value, dtype, order="C")
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
    """Check what readers of `kohya` assume: that every block has an adapter on each of its ten linear layers, and that
    there are no others."""
    layers = set()
    for linear in lora.adapters:
        if isinstance(linear, OuterLinear):
            raise InputError(f"{path}: dialect kohya has no adapter on {linear}; choose comfy or diffusers")
        layers.add(linear.layer)
    for layer in range(max(layers) + 1):
        for linear in (BlockLinear(layer, name) for name in BLOCK_LINEARS):
            if linear not in lora.adapters:
                raise InputError(
                    f"{path}: dialect kohya needs an adapter on every linear layer, but {linear} has none; "
                    f"train with lora.targets: [{', '.join(LORA_TARGETS)}], or choose another dialect"
                )


# --- Reading ---------------------------------------------------------------------------------------------------------

_Parts = dict[str, LazyTensor]
"""The tensors of one module by part: A, B, and alpha and magnitude if the file has them."""


def read_lora(path: Path) -> Lora:
    """Read a LoRA file of any dialect. A file that cannot be read completely is refused.

    Keys may contain `.default`, and may call the factors `lora_A` and `lora_B` or `lora_down` and `lora_up`. The prefix
    may be `lora_unet_`, `diffusion_model.`, `pipe.dit.`, `transformer.`, `base_model.model.` or none.

    alpha comes from the `.alpha` tensors, from the metadata that diffusers writes, or from PEFT's `adapter_config.json`
    beside the file. Without any of these, alpha is the rank, as the loaders of such files assume.

    Raises:
        InputError: the file is not safetensors, or it has a key that does not belong to a Wan2.1-T2V LoRA (such as
            that of a layer that only I2V has), `.dora_scale`, a factor without its counterpart, `lora_unet_` keys
            without `.alpha`, or a value that is not finite.
    """
    tensors = open_safetensors(path)
    metadata = safetensors_metadata(path)
    named = {key: name for key in tensors if (name := parse_difference(key))}
    modules = _modules(path, {key: tensor for key, tensor in tensors.items() if key not in named})
    adapters = {linear: _adapter(path, linear, parts) for linear, parts in modules.items()}
    for factor in ("a", "b"):
        _check_same_widths(path, factor, adapters)
    magnitudes = _magnitudes(path, modules)
    ranks = {adapter.a.shape[0] for adapter in adapters.values()}
    configured = peft_config.configured_alpha(path, tensors.keys(), metadata, ranks, bool(magnitudes))
    alphas = _alphas(path, tensors, modules, adapters, configured)
    return uniform(adapters, alphas)._replace(
        metadata={key: value for key, value in metadata.items() if key not in ("format", peft_config.METADATA)},
        differences=_differences(path, tensors, named),
        magnitudes=magnitudes,
    )


def _modules(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[TransformerLinear, _Parts]:
    """Group the tensors by linear layer, in the order of the network, and by part. Every key must be recognised."""
    found: dict[TransformerLinear, dict[str, str]] = {}
    unknown = []
    for key in tensors:
        parsed = parse_factor(key)
        if is_dora_scale(key):
            raise InputError(
                f"{path}: {short_repr(key)} belongs to a DoRA whose norms differ from program to program; expected a "
                "DoRA with .lora_magnitude_vector, as PEFT and diffusers write it"
            )
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
            f"{similar(unknown[0], tensors.keys() - set(unknown)) if unknown else ''}"
        )
    whole = sum(keys.keys() >= {"A", "B"} for keys in found.values())
    ordered = sorted(found, key=network_order)
    for linear in ordered:
        for part in ("A", "B"):
            if part not in found[linear]:
                raise InputError(
                    f"{path}: {linear} has no {part} factor, but {whole} of {len(found)} modules have both; "
                    "expected lora_A and lora_B (or lora_down and lora_up) for each"
                )
    return {linear: {part: tensors[key] for part, key in found[linear].items()} for linear in ordered}


def _adapter(path: Path, linear: TransformerLinear, parts: _Parts) -> Adapter:
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


def _magnitudes(path: Path, modules: Mapping[TransformerLinear, _Parts]) -> dict[TransformerLinear, np.ndarray]:
    """Read the magnitudes of a DoRA, which all modules have or none."""
    values: dict[TransformerLinear, np.ndarray] = {}
    for linear, parts in modules.items():
        if "magnitude" in parts:
            values[linear] = np.asarray(parts["magnitude"].read(...), np.float32)
            if values[linear].shape != parts["B"].shape[:1] or not np.isfinite(values[linear]).all():
                problem = f"magnitude of {linear} has shape {list(values[linear].shape)} or a value that is not finite"
                raise InputError(f"{path}: {problem}; expected {parts['B'].shape[0]} finite numbers")
    for linear in modules if values else ():
        if linear not in values:
            raise InputError(f"{path}: {linear} has no magnitude, but other modules do; expected it in all or in none")
    return values


def _check_same_widths(path: Path, factor: Literal["a", "b"], adapters: Mapping[TransformerLinear, Adapter]) -> None:
    """Check that the factor of each linear layer has the same width in every block. The rank may differ."""
    first: dict[str, TransformerLinear] = {}
    axis = 1 if factor == "a" else 0
    for linear, adapter in adapters.items():
        shape = getattr(adapter, factor).shape
        other = first.setdefault(linear.name, linear)
        expected = getattr(adapters[other], factor).shape
        if shape[axis] != expected[axis]:
            raise InputError(
                f"{path}: {factor.upper()} of {linear} is {list(shape)}; expected {list(expected)}, as in {other}"
            )


def _alphas(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    modules: Mapping[TransformerLinear, _Parts],
    adapters: Mapping[TransformerLinear, Adapter],
    configured: float | None,
) -> dict[TransformerLinear, float]:
    """Return alpha of every module: its `.alpha` tensor, otherwise `configured`, otherwise the rank."""
    if not any("alpha" in parts for parts in modules.values()):
        if any(key.startswith("lora_unet_") for key in tensors):
            raise InputError(
                f"{path}: has lora_unet_ keys without .alpha, for which readers assume different defaults; "
                "expected .alpha in every module"
            )
        return {linear: float(configured or adapter.a.shape[0]) for linear, adapter in adapters.items()}
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
    return alphas


def uniform(adapters: dict[TransformerLinear, Adapter], alphas: Mapping[TransformerLinear, float]) -> Lora:
    """Return a LoRA with one rank and one alpha. If the modules have several, the scales are multiplied into the
    factors, and zeros fill the factors up to the largest rank.

    Some loaders assume one rank and one scale: diffusers, for example, applies the alpha of one module to all others.
    """
    ranks = {linear: adapter.a.shape[0] for linear, adapter in adapters.items()}
    rank = max(ranks.values())
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        return Lora(adapters, rank, next(iter(alphas.values())))
    padded: dict[TransformerLinear, Adapter] = {}
    for linear, (a, b) in adapters.items():
        factor = np.float32(math.sqrt(alphas[linear] / ranks[linear]))
        more = (0, rank - ranks[linear])
        padded[linear] = Adapter(np.pad(a * factor, (more, (0, 0))), np.pad(b * factor, ((0, 0), more)))
    return Lora(padded, rank, float(rank))


def _differences(path: Path, tensors: Mapping[str, LazyTensor], named: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Read the differences; `named` maps their keys to the names of the tensors to which they are added."""
    values: dict[str, np.ndarray] = {}
    for key, name in named.items():
        if name in values:
            raise InputError(f"{path}: {short_repr(key)} is a second difference for {name}; expected only one")
        values[name] = np.asarray(tensors[key].read(...), np.float32)
        if not np.isfinite(values[name]).all():
            raise InputError(f"{path}: {short_repr(key)} is not finite; expected finite numbers")
    return values
