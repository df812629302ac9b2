"""LoRA files for Wan2.1: write the four dialects that other programs load, read them all.

What loads what, found by running the loaders (all modules, or none; "none" often goes with a warning at most):

    dialect      key of an A factor                                          DiffSynth  diffusers  ComfyUI
    comfy        diffusion_model.blocks.0.self_attn.q.lora_A.weight          all        all        all
    diffsynth    blocks.0.self_attn.q.lora_A.default.weight                  all        none       none
    diffusers    transformer.blocks.0.attn1.to_q.lora_A.weight               none       all        none
    kohya        lora_unet_blocks_0_self_attn_q.lora_down.weight             none       all        all

The weights become W + alpha / rank * B A. Where alpha is kept differs too: DiffSynth may ignore it, so `comfy` and
`diffsynth` files have alpha = rank and the scale inside the factors; `kohya` has a tensor `.alpha` in every module;
`diffusers` has it in the file's metadata.
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
from tfm_jax.inputs import checked, parse_json, read_json, shown
from tfm_jax.wan.names import block_linears
from tfm_jax.wan.tensors import Entry, open_safetensors, safetensors_metadata

Dialect = Literal["comfy", "diffsynth", "diffusers", "kohya"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

Number = TypeVar("Number", int, float)


class Adapter(NamedTuple):
    """The two factors on one linear map, with torch's axes: the weight `[out, in]` gets alpha / rank * B A."""

    a: Float32[np.ndarray, "rank in"]
    b: Float32[np.ndarray, "out rank"]


class Lora(NamedTuple):
    """All adapters of a model."""

    adapters: dict[str, Adapter]
    """By the original name of the linear map: `blocks.0.self_attn.q`, `blocks.7.ffn.2`."""
    rank: int
    alpha: float
    metadata: Mapping[str, str] = MappingProxyType({})
    """What the file that this was read from says of itself: base model, steps and the like."""


class _Keys(NamedTuple):
    """How a dialect spells a module and its two factors."""

    module: str
    a: str
    b: str


_DIALECT_KEYS: dict[Dialect, _Keys] = {
    "comfy": _Keys("diffusion_model.blocks.{layer}.{original}", "lora_A.weight", "lora_B.weight"),
    "diffsynth": _Keys("blocks.{layer}.{original}", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": _Keys("transformer.blocks.{layer}.{diffusers}", "lora_A.weight", "lora_B.weight"),
    "kohya": _Keys("lora_unet_blocks_{layer}_{kohya}", "lora_down.weight", "lora_up.weight"),
}

_DIFFUSERS_NAMES = {original: diffusers for _, original, diffusers in block_linears()}
_KOHYA_NAMES = {original: original.replace(".", "_") for original in _DIFFUSERS_NAMES}

_METADATA = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_lora(
    path: Path,
    lora: Lora,
    dialect: Dialect = "comfy",
    dtype: DTypeLike = ml_dtypes.bfloat16,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write `lora` to `path`, whole or not at all.

    `comfy` (ComfyUI, diffusers, DiffSynth) is the one to share. `diffsynth` is for DiffSynth alone and is what the TFM
    release writes; `diffusers` for diffusers alone; `kohya` for musubi-tuner, ComfyUI and diffusers. `metadata` goes
    into the file as it is: how the LoRA came to be.

    Raises:
        InputError: `path` is a directory; `kohya` and not all ten linear maps of every block have an adapter; a factor
            that is not finite in `dtype`.
    """
    if path.is_dir():
        raise InputError(f"{path}: a directory; expected the name of a file")
    if dialect == "kohya":
        _require_every_map(path, lora)
    scale = lora.alpha / lora.rank
    factor = math.sqrt(scale) if dialect in ("comfy", "diffsynth") else 1.0
    keys = _DIALECT_KEYS[dialect]
    tensors: dict[str, np.ndarray] = {}
    for name, adapter in lora.adapters.items():
        module = _spell(keys.module, name)
        for key, value in ((keys.a, adapter.a), (keys.b, adapter.b)):
            # The writer takes bytes as they lie in memory, so a transposed view has to be copied.
            with np.errstate(over="ignore"):
                tensors[f"{module}.{key}"] = np.array(value * np.float32(factor), dtype, order="C")
        if dialect == "kohya":
            tensors[f"{module}.alpha"] = np.array(lora.alpha, np.float32)
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise InputError(f"{path}: {key} would not be finite in {value.dtype}; nothing is written")

    facts = {**metadata, "format": "pt"}
    if dialect == "diffusers" and scale != 1:
        facts[_METADATA] = json.dumps(_diffusers_config(lora))
    with replacing(path) as scratch:
        save_file(tensors, scratch, facts)
        _sort_metadata(scratch)
        scratch.chmod(0o644)  # safetensors lets nobody else read it


def _sort_metadata(file: Path) -> None:
    """Put the metadata into the order of its names: safetensors writes it in a random order, other bytes each time."""
    with open(file, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        stream.seek(8)
        stream.write(text.ljust(size))


def _spell(pattern: str, name: str) -> str:
    _, layer, original = name.split(".", 2)
    return pattern.format(
        layer=layer, original=original, diffusers=_DIFFUSERS_NAMES[original], kohya=_KOHYA_NAMES[original]
    )


def _require_every_map(path: Path, lora: Lora) -> None:
    """The readers of `kohya` count the blocks, and then ask for the ten maps of each."""
    layers = {int(name.split(".")[1]) for name in lora.adapters}
    for layer in range(max(layers) + 1):
        for original in _DIFFUSERS_NAMES:
            if f"blocks.{layer}.{original}" not in lora.adapters:
                targets = ", ".join(dict.fromkeys(re.sub(r"^\w+_attn\.", "", name) for name in _DIFFUSERS_NAMES))
                raise InputError(
                    f"{path}: dialect kohya needs an adapter on every linear map, blocks.{layer}.{original} has none; "
                    f"train with lora.targets: [{targets}], or choose another dialect"
                )


def _diffusers_config(lora: Lora) -> dict[str, object]:
    """Metadata that `diffusers.loaders.WanLoraLoaderMixin` hands to `peft.LoraConfig`, less the prefix."""
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    modules = [_spell("blocks.{layer}.{diffusers}", name) for name in lora.adapters]
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

_NAMES = {name: original for original, diffusers in _DIFFUSERS_NAMES.items() for name in (original, diffusers)}
_NAMES_OF_KOHYA = {kohya: original for original, kohya in _KOHYA_NAMES.items()}
_PARTS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha"}

_Parts = dict[str, Entry]
"""Of one module, by A, B, alpha."""


def read_lora(path: Path) -> Lora:
    """Read a LoRA file of any dialect; it is used as a whole or refused.

    Read are the four dialects, with `.default` or not, with `lora_A`, `lora_B` or `lora_down`, `lora_up`, and with the
    prefixes `diffusion_model.`, `pipe.dit.`, `transformer.`, `base_model.model.` or none. alpha is that of the `.alpha`
    tensors, of the metadata that diffusers writes, or of PEFT's `adapter_config.json` beside the file; failing all,
    alpha = rank, which is what the loaders of such files take it for.

    Raises:
        InputError: not a safetensors file, a key left over (I2V's maps too), an A without its B, ranks or alphas that
            differ, `lora_unet_` without `.alpha`, a value that is not finite.
    """
    entries = open_safetensors(path)
    metadata = safetensors_metadata(path)
    modules = _modules(path, entries)
    adapters = {name: _adapter(path, name, parts) for name, parts in modules.items()}
    rank = _common(path, "rank", {name: adapter.a.shape[0] for name, adapter in adapters.items()})
    for factor in ("a", "b"):
        _check_same_shapes(path, factor, adapters)
    alpha = _configured_alpha(path, entries, metadata, rank)
    facts = {key: value for key, value in metadata.items() if key not in ("format", _METADATA)}
    return Lora(adapters, rank, _alpha(path, entries, modules, rank, alpha), facts)


def _modules(path: Path, entries: Mapping[str, Entry]) -> dict[str, _Parts]:
    """The tensors by module and part, blocks in order; every key has a place."""
    places: dict[tuple[int, str, str], str] = {}
    left_over = []
    for key in entries:
        place = _place(key)
        if place is None:
            left_over.append(key)
        elif place in places:
            raise InputError(
                f"{path}: {shown(key)} and {shown(places[place])} are the same factor; expected one of them"
            )
        else:
            places[place] = key
    if left_over or not places:
        raise InputError(
            f"{path}: matched {len(places)} of {len(entries)} keys, not {shown(left_over[0]) if left_over else 'one'}; "
            f"expected lora_A and lora_B on {', '.join(_DIFFUSERS_NAMES)} of Wan2.1-T2V blocks"
        )
    order = {original: number for number, original in enumerate(_DIFFUSERS_NAMES)}
    modules: dict[str, _Parts] = {}
    for layer, original, part in sorted(places, key=lambda place: (place[0], order[place[1]], place[2])):
        modules.setdefault(f"blocks.{layer}.{original}", {})[part] = entries[places[layer, original, part]]
    whole = sum(parts.keys() >= {"A", "B"} for parts in modules.values())
    for name, parts in modules.items():
        for part in ("A", "B"):
            if part not in parts:
                raise InputError(
                    f"{path}: {name} has no {part} factor, matched {whole} of {len(modules)} modules; "
                    "expected lora_A and lora_B (or lora_down and lora_up) for each"
                )
    return modules


def _place(key: str) -> tuple[int, str, str] | None:
    """Block, original name and part of a key; None if it is none of a Wan2.1-T2V LoRA."""
    match = _KEY.fullmatch(key)
    if not match:
        return None
    part = _PARTS[match["part"].split(".")[0]]
    if match["kohya_name"]:
        layer, original = match["kohya_layer"], _NAMES_OF_KOHYA.get(match["kohya_name"])
    else:
        layer, original = match["layer"], _NAMES.get(match["name"])
    return (int(layer), original, part) if original else None


def _adapter(path: Path, name: str, parts: _Parts) -> Adapter:
    a, b = parts["A"].shape, parts["B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
        raise InputError(f"{path}: {name} has A {list(a)} and B {list(b)}; expected [rank, in] and [out, rank]")
    factors = []
    for part in ("A", "B"):
        value = np.asarray(parts[part].read(...), np.float32)
        if not np.isfinite(value).all():
            raise InputError(f"{path}: {part} factor of {name} has values that are not finite; expected finite ones")
        factors.append(value)
    return Adapter(*factors)


def _check_same_shapes(path: Path, factor: Literal["a", "b"], adapters: Mapping[str, Adapter]) -> None:
    """All blocks of a transformer are alike."""
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, adapter in adapters.items():
        shape = getattr(adapter, factor).shape
        other, expected = first.setdefault(name.split(".", 2)[2], (name, shape))
        if shape != expected:
            raise InputError(
                f"{path}: {factor.upper()} of {name} is {list(shape)}; expected {list(expected)}, as in {other}"
            )


def _alpha(
    path: Path, entries: Mapping[str, Entry], modules: Mapping[str, _Parts], rank: int, configured: float | None
) -> float:
    """The one alpha of a file: of its `.alpha` tensors, else as configured, else its rank."""
    if not any("alpha" in parts for parts in modules.values()):
        if any(key.startswith("lora_unet_") for key in entries):
            raise InputError(
                f"{path}: no .alpha beside lora_unet_ keys, readers disagree on what that means; expected it"
            )
        return float(rank) if configured is None else configured
    if configured is not None:
        raise InputError(f"{path}: has .alpha tensors, and alpha {configured:g} in its metadata; expected one of them")

    alphas = {}
    for name, parts in modules.items():
        if "alpha" not in parts:
            raise InputError(f"{path}: {name} has no .alpha, other modules do; expected it in all or in none")
        if math.prod(parts["alpha"].shape) != 1:
            raise InputError(f"{path}: .alpha of {name} is {list(parts['alpha'].shape)}; expected one number")
        alphas[name] = float(parts["alpha"].read(...).item())
        if not 0 < alphas[name] < math.inf:
            raise InputError(f"{path}: .alpha of {name} is {alphas[name]:g}; expected a positive number")
    return _common(path, "alpha", alphas)


def _common(path: Path, what: str, values: Mapping[str, Number]) -> Number:
    """The value that all modules have."""
    first, value = next(iter(values.items()))
    for name, other in values.items():
        if other != value:
            raise InputError(f"{path}: {first} has {what} {value:g}, {name} has {other:g}; expected the same in all")
    return value


def _configured_alpha(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], rank: int) -> float | None:
    """alpha of the `peft.LoraConfig` that diffusers puts into the metadata, PEFT beside the file; None without one.

    diffusers' pipelines write its fields with `transformer.` in front, its models without.
    """
    config_file = path.with_name("adapter_config.json")
    if _METADATA in metadata:
        place = f"{path}: metadata {_METADATA}"
        values = parse_json(metadata[_METADATA], place)
    elif all(key.startswith(_PEFT_PREFIX) for key in entries) and config_file.is_file():
        place, values = str(config_file), read_json(config_file)
    else:
        return None
    fields = {key.removeprefix("transformer."): value for key, value in values.items()}
    for field in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        if fields.get(field):
            raise InputError(f"{place}: {field} is {shown(fields[field])}; expected a plain LoRA without it")
    config = checked(_PeftConfig, fields, place)
    if config.r != rank:
        raise InputError(f"{place}: r is {config.r}; expected {rank}, the rank of the tensors")
    return config.lora_alpha


class _PeftConfig(pydantic.BaseModel):
    """What a `peft.LoraConfig` says of the scale of its adapters."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    r: int
    lora_alpha: Annotated[float, pydantic.Field(gt=0, lt=1e30)]
