"""What a directory of Wan2.1 weights looks like: which files, which config.json, in each of three layouts.

- diffusers: `transformer/`, `vae/`, `text_encoder/`, `tokenizer/`, each with its config.json and safetensors.
- original (Wan-AI): config.json and safetensors of the transformer, `.pth` files of the other two, `google/umt5-xxl/`.
- tfm_jax: as diffusers, but with our names, axes and stacked layers: what `convert_weights.py --to=tfm_jax` writes.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from tfm_jax.errors import InputError
from tfm_jax.wan import names
from tfm_jax.wan.tensors import Entry, Shape, Tensors, open_pth, open_tensors, safetensors_in
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder
from tfm_jax.wan.transformer import PATCH, TransformerConfig, WanTransformer
from tfm_jax.wan.vae import VaeConfig, WanVae

Layout = Literal["diffusers", "original", "tfm_jax"]
Architecture = TransformerConfig | VaeConfig | TextEncoderConfig


class Component(NamedTuple):
    """One of the three networks, whatever its layout."""

    name: str
    architecture: type
    build: Callable[..., nnx.Module]
    rows: Callable[[Any], list[names.Row]]
    class_name: str
    """In the config.json of the Diffusers layout."""
    files: str
    """Stem of its safetensors files in the Diffusers layout."""


TRANSFORMER = Component(
    "transformer",
    TransformerConfig,
    WanTransformer,
    lambda config: names.transformer_rows(config.layers),
    "WanTransformer3DModel",
    "diffusion_pytorch_model",
)
VAE = Component("vae", VaeConfig, WanVae, names.vae_rows, "AutoencoderKLWan", "diffusion_pytorch_model")
TEXT_ENCODER = Component(
    "text_encoder",
    TextEncoderConfig,
    UMT5Encoder,
    lambda config: names.text_encoder_rows(config.layers),
    "UMT5EncoderModel",
    "model",
)
COMPONENTS = (TRANSFORMER, VAE, TEXT_ENCODER)
ORIGINAL_FILES = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}


class Source(NamedTuple):
    """The weights of one network, found and understood but not yet read."""

    component: Component
    layout: Layout
    config: Any
    place: Path
    tensors: Tensors

    def name(self, row: names.Row) -> str:
        """What the source calls the tensor of a row."""
        return row.ours if self.layout == "tfm_jax" else getattr(row, self.layout)

    def read(self, row: names.Row, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor of a row (or a part of it), with our axes, without the axis of stacked layers."""
        if self.layout == "tfm_jax":
            stacked = () if row.layer is None else (row.layer,)
            return self.tensors[row.ours].read((*stacked, *(index or ())) or ...)
        theirs = self.tensors[self.name(row)]
        if index is None:
            return rearrange(theirs.read(...), row.axes)
        before, after = (side.split() for side in row.axes.split("->"))
        piece = tuple(slice(None) if a == "1" else index[after.index(a)] for a in before)
        return rearrange(theirs.read(piece), row.axes)

    def outermost(self, row: names.Row) -> int:
        """Which of our axes (without that of stacked layers) varies slowest in the file."""
        if self.layout == "tfm_jax":
            return 0
        before, after = (side.split() for side in row.axes.split("->"))
        return after.index(next(a for a in before if a != "1"))


# --- Finding ---------------------------------------------------------------------------------------------------------


def find(path: Path, component: Component) -> Source:
    """The network `component` under `path`: the directory of a model, or of that network alone.

    Raises:
        InputError: nothing that looks like it is there, or it is of a kind that this library does not run.
    """
    source = find_any(path, component)
    if not source:
        original = ORIGINAL_FILES.get(component.name, "config.json of a WanModel")
        raise InputError(
            f"{path}: no {component.name} found; expected {component.name}/config.json (Diffusers layout) "
            f"or {original} (original layout)"
        )
    return source


def find_any(path: Path, component: Component) -> Source | None:
    """As `find`, but None where there is nothing that looks like it."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; expected Wan2.1 weights")
    for directory in (path / component.name, path):
        config = directory / "config.json"
        if config.is_file():
            found = _from_config(config, component)
            if found:
                return found
    pth = path / ORIGINAL_FILES.get(component.name, "-")
    if not pth.is_file():
        return None
    tensors = _untied(open_pth(pth))
    infer = {"vae": names.vae_config_from_shapes, "text_encoder": names.text_encoder_config_from_shapes}
    return Source(component, "original", _understood(pth, infer[component.name], _shapes(tensors)), pth, tensors)


def _from_config(file: Path, component: Component) -> Source | None:
    """The network that a config.json describes; None if it is another one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        kind = values.get("_class_name") or (values.get("architectures") or [None])[0]
    except (ValueError, AttributeError, TypeError, KeyError):
        raise InputError(f"{file}: not the configuration of a model; expected a JSON object") from None
    readers: dict[str | None, tuple[Component, Layout, Callable]] = {
        "WanTransformer3DModel": (TRANSFORMER, "diffusers", _diffusers_transformer),
        "WanModel": (TRANSFORMER, "original", _original_transformer),
        "AutoencoderKLWan": (VAE, "diffusers", _diffusers_vae),
        "UMT5EncoderModel": (TEXT_ENCODER, "diffusers", _diffusers_text_encoder),
    }
    readers |= {f"tfm_jax.{c.name}": (c, "tfm_jax", c.architecture) for c in COMPONENTS}
    if kind not in readers:
        known = ", ".join(str(name) for name in readers)
        raise InputError(f"{file}: model class is {kind}; expected one of {known}")
    found, layout, read = readers[kind]
    if found is not component:
        return None
    tensors = _untied(open_tensors(safetensors_in(file.parent)))
    if layout == "tfm_jax":
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "_class_name"}
        config = _understood(file, lambda: read(**fields))
    else:
        config = _understood(file, read, values, _shapes(tensors))
    return Source(component, layout, config, file, tensors)


def _understood(file: Path, read: Callable, *arguments: Any) -> Architecture:
    try:
        return read(*arguments)
    except KeyError as error:
        raise InputError(f"{file}: {error.args[0]} is missing; expected the weights of a Wan2.1-T2V model") from None
    except (InputError, TypeError) as error:
        raise InputError(f"{file}: {error}") from None


def _shapes(tensors: Tensors) -> dict[str, Shape]:
    return {name: entry.shape for name, entry in tensors.items()}


def _untied(tensors: Tensors) -> Tensors:
    """Without the second name under which some files hold the same tensor."""
    return {
        names.TEXT_ENCODER_ALIASES.get(name, name): entry
        for name, entry in tensors.items()
        if names.TEXT_ENCODER_ALIASES.get(name) not in tensors
    }


# --- Configurations --------------------------------------------------------------------------------------------------

_DIFFUSERS_FIXED = {
    "patch_size": list(PATCH),
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
_VAE_FIXED = {"attn_scales": [], "is_residual": False, "patch_size": None, "decoder_base_dim": None}


def _require_fixed(values: dict, fixed: dict[str, Any], **more: Any) -> None:
    for name, expected in (fixed | more).items():
        if values.get(name, expected) != expected:
            raise InputError(f"{name} is {values[name]}; expected {expected}, as in Wan2.1 text-to-video")


def _diffusers_transformer(values: dict, shapes: dict[str, Shape]) -> TransformerConfig:
    del shapes
    _require_fixed(values, _DIFFUSERS_FIXED, out_channels=values["in_channels"])
    return TransformerConfig(
        dim=values["num_attention_heads"] * values["attention_head_dim"],
        ffn_dim=values["ffn_dim"],
        heads=values["num_attention_heads"],
        layers=values["num_layers"],
        text_dim=values["text_dim"],
        freq_dim=values["freq_dim"],
        channels=values["in_channels"],
        eps=values["eps"],
    )


def _original_transformer(values: dict, shapes: dict[str, Shape]) -> TransformerConfig:
    _require_fixed(values, {"model_type": "t2v"}, out_dim=values["in_dim"])
    return TransformerConfig(
        dim=values["dim"],
        ffn_dim=values["ffn_dim"],
        heads=values["num_heads"],
        layers=values["num_layers"],
        text_dim=names.text_dim_from_shapes(shapes),
        freq_dim=values["freq_dim"],
        channels=values["in_dim"],
        eps=values["eps"],
    )


def _diffusers_vae(values: dict, shapes: dict[str, Shape]) -> VaeConfig:
    del shapes
    _require_fixed(values, _VAE_FIXED)
    return VaeConfig(
        base_dim=values["base_dim"],
        z_dim=values["z_dim"],
        dim_mult=tuple(values["dim_mult"]),
        num_res_blocks=values["num_res_blocks"],
        temporal_downsample=tuple(values["temperal_downsample"]),
        latents_mean=tuple(values["latents_mean"]),
        latents_std=tuple(values["latents_std"]),
    )


def _diffusers_text_encoder(values: dict, shapes: dict[str, Shape]) -> TextEncoderConfig:
    del shapes
    _require_fixed(values, {"feed_forward_proj": "gated-gelu"})
    return TextEncoderConfig(
        vocab_size=values["vocab_size"],
        dim=values["d_model"],
        heads=values["num_heads"],
        head_dim=values["d_kv"],
        ffn_dim=values["d_ff"],
        layers=values["num_layers"],
        buckets=values["relative_attention_num_buckets"],
        max_distance=values["relative_attention_max_distance"],
        eps=values["layer_norm_epsilon"],
    )


def config_json(component: Component, layout: Layout, config: Any) -> dict[str, Any]:
    """The config.json of a network: what `find` reads back, and what the layout's own programs expect."""
    if layout == "tfm_jax":
        return {"_class_name": f"tfm_jax.{component.name}", **dataclasses.asdict(config)}
    if isinstance(config, TransformerConfig) and layout == "original":
        return {
            "_class_name": "WanModel",
            "model_type": "t2v",
            "dim": config.dim,
            "ffn_dim": config.ffn_dim,
            "num_heads": config.heads,
            "num_layers": config.layers,
            "freq_dim": config.freq_dim,
            "in_dim": config.channels,
            "out_dim": config.channels,
            "text_len": 512,
            "eps": config.eps,
        }
    if isinstance(config, TransformerConfig):
        return {
            "_class_name": component.class_name,
            **_DIFFUSERS_FIXED,
            "num_attention_heads": config.heads,
            "attention_head_dim": config.head_dim,
            "in_channels": config.channels,
            "out_channels": config.channels,
            "text_dim": config.text_dim,
            "freq_dim": config.freq_dim,
            "ffn_dim": config.ffn_dim,
            "num_layers": config.layers,
            "eps": config.eps,
        }
    if isinstance(config, VaeConfig):
        return {
            "_class_name": component.class_name,
            "base_dim": config.base_dim,
            "z_dim": config.z_dim,
            "dim_mult": config.dim_mult,
            "num_res_blocks": config.num_res_blocks,
            "attn_scales": [],
            "temperal_downsample": config.temporal_downsample,
            "dropout": 0.0,
            "latents_mean": config.latents_mean,
            "latents_std": config.latents_std,
        }
    return {
        "architectures": [component.class_name],
        "model_type": "umt5",
        "vocab_size": config.vocab_size,
        "d_model": config.dim,
        "num_heads": config.heads,
        "d_kv": config.head_dim,
        "d_ff": config.ffn_dim,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.eps,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    }


# --- Checking --------------------------------------------------------------------------------------------------------


def expected_tensors(source_layout: Layout, rows: list[names.Row], shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Name -> shape of every tensor of a network in a layout, from the shapes of our parameters."""
    if source_layout == "tfm_jax":
        return dict(shapes)
    expected = {}
    for row in rows:
        ours = shapes[row.ours][0 if row.layer is None else 1 :]
        before, after = (side.split() for side in row.axes.split("->"))
        expected[getattr(row, source_layout)] = tuple(1 if a == "1" else ours[after.index(a)] for a in before)
    return expected


def check_tensors(place: Path, tensors: Tensors, expected: dict[str, Shape]) -> None:
    """Raise InputError, with the nearest candidates, unless the tensors are exactly those expected."""

    def nearest(name: str, others: set[str]) -> str:
        close = difflib.get_close_matches(name, sorted(others), n=3, cutoff=0.6)
        return f" (nearest: {', '.join(close)})" if close else ""

    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing:
        name = min(missing)
        raise InputError(
            f"{place}: {len(missing)} of {len(expected)} tensors are missing, such as {name} "
            f"{list(expected[name])}{nearest(name, extra)}"
        )
    if extra:
        name = min(extra)
        raise InputError(
            f"{place}: {len(extra)} tensors are not of this model, such as {name} in "
            f"{tensors[name].file.name}{nearest(name, set(expected))}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}; expected {list(shape)}"
            )


def source_of(module: nnx.Module, component: Component) -> Source:
    """A network in memory, as a source in our own layout."""
    tensors = {
        ".".join(map(str, path)): Entry(variable.shape, Path("memory"), np.asarray(variable.get_value()).__getitem__)
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }
    return Source(component, "tfm_jax", module.config, Path("memory"), tensors)  # type: ignore[attr-defined]


def parameters(component: Component, config: Any, dtype: DTypeLike) -> dict[str, Any]:
    """Path -> abstract value (shape, dtype) of every parameter of a network whose kernels are in `dtype`."""
    module = abstract(component, config, dtype)
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(module))}


def abstract(component: Component, config: Any, dtype: DTypeLike) -> nnx.Module:
    """The network with shapes and types instead of numbers."""
    return nnx.eval_shape(lambda: component.build(config, rngs=nnx.Rngs(0), dtype=dtype))
