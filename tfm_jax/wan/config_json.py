"""Tables that translate the config.json of each network and layout to and from our dataclasses.

A file has our fields under its own keys (`keys`), repeats some of their values under other keys (`copies`), and has
keys whose value is the same in every Wan2.1 text-to-video model (`fixed`). Reading also validates types and ranges.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic
from pydantic import Field, Strict

from tfm_jax.arrays import TEXT_LENGTH
from tfm_jax.errors import InputError
from tfm_jax.inputs import short_repr, validate
from tfm_jax.wan.names import Layout
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.transformer import PATCH, TransformerConfig
from tfm_jax.wan.vae import VaeConfig

Config = TypeVar("Config", TransformerConfig, VaeConfig, TextEncoderConfig)

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Schema(NamedTuple):
    """How config.json describes the architecture of one network in one layout."""

    class_name: str
    """Name of the model class in the file."""
    keys: Mapping[str, str]
    """Our field or property -> key in the file. In the public layouts, all of these keys are required."""
    optional: Mapping[str, str] = _NOTHING
    """Field with a default -> key that the file may lack. It is written if the field has another value."""
    copies: Mapping[str, str] = _NOTHING
    """Optional key -> our field, whose value the key must repeat."""
    fixed: Mapping[str, Any] = _NOTHING
    """Optional key -> the only accepted value."""
    written: Mapping[str, Any] = _NOTHING
    """Key -> value to write in addition, for other programs that read the layout."""


def _tfm_jax(name: str, config: type) -> Schema:
    return Schema(f"tfm_jax.{name}", {field.name: field.name for field in dataclasses.fields(config)})


_T2V = {
    "patch_size": list(PATCH),
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}

SCHEMAS: dict[tuple[str, Layout], Schema] = {
    ("transformer", "diffusers"): Schema(
        "WanTransformer3DModel",
        {
            "heads": "num_attention_heads",
            "head_dim": "attention_head_dim",
            "channels": "in_channels",
            "text_dim": "text_dim",
            "freq_dim": "freq_dim",
            "ffn_dim": "ffn_dim",
            "layers": "num_layers",
            "eps": "eps",
        },
        optional={"text_len": "text_len"},  # not known to diffusers: see `max_sequence_length` of its pipeline
        copies={"out_channels": "channels"},
        fixed=_T2V,
        written=_T2V,
    ),
    ("transformer", "original"): Schema(
        "WanModel",
        {
            "dim": "dim",
            "ffn_dim": "ffn_dim",
            "heads": "num_heads",
            "layers": "num_layers",
            "freq_dim": "freq_dim",
            "channels": "in_dim",
            "eps": "eps",
        },
        optional={"text_len": "text_len"},
        copies={"out_dim": "channels"},
        fixed={"model_type": "t2v"},
        written={"model_type": "t2v", "text_len": TEXT_LENGTH},
    ),
    ("vae", "diffusers"): Schema(
        "AutoencoderKLWan",
        {
            "base_dim": "base_dim",
            "z_dim": "z_dim",
            "dim_mult": "dim_mult",
            "num_res_blocks": "num_res_blocks",
            "temporal_downsample": "temperal_downsample",  # spelt this way in diffusers
            "latents_mean": "latents_mean",
            "latents_std": "latents_std",
        },
        fixed={"attn_scales": [], "is_residual": False, "patch_size": None, "decoder_base_dim": None},
        written={"attn_scales": [], "dropout": 0.0},
    ),
    ("text_encoder", "diffusers"): Schema(
        "UMT5EncoderModel",
        {
            "vocab_size": "vocab_size",
            "dim": "d_model",
            "heads": "num_heads",
            "head_dim": "d_kv",
            "ffn_dim": "d_ff",
            "layers": "num_layers",
            "buckets": "relative_attention_num_buckets",
            "max_distance": "relative_attention_max_distance",
            "eps": "layer_norm_epsilon",
        },
        fixed={"feed_forward_proj": "gated-gelu"},
        written={
            "model_type": "umt5",
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "is_encoder_decoder": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "tie_word_embeddings": False,
        },
    ),
    ("transformer", "tfm_jax"): _tfm_jax("transformer", TransformerConfig),
    ("vae", "tfm_jax"): _tfm_jax("vae", VaeConfig),
    ("text_encoder", "tfm_jax"): _tfm_jax("text_encoder", TextEncoderConfig),
}

MAX_SIZE = 2**20
"""About four times the largest size in Wan2.1, the vocabulary of umT5."""

Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Real = Annotated[float, Field(allow_inf_nan=False)]
PositiveReal = Annotated[Real, Field(gt=0)]


def _list(item: Any, at_most: int) -> Any:
    """Return the type of a field that is a list in JSON and a tuple in our dataclasses."""
    return Annotated[tuple[item, ...], Strict(False), Field(min_length=1, max_length=at_most)]


_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("dim", "ffn_dim", "heads", "head_dim", "text_dim", "channels", "base_dim", "z_dim"), Size),
    **dict.fromkeys(("vocab_size", "max_distance"), Size),
    "layers": Layers,
    "freq_dim": Annotated[Size, Field(multiple_of=2)],
    "text_len": Annotated[int, Field(ge=1, le=TEXT_LENGTH)],
    "buckets": Annotated[Size, Field(ge=4)],
    "eps": Annotated[PositiveReal, Field(lt=1)],
    "num_res_blocks": Annotated[int, Field(ge=1, le=100)],
    "dim_mult": _list(Annotated[int, Field(ge=1, le=1000)], 10),
    "temporal_downsample": _list(bool, 10),
    "latents_mean": _list(Real, MAX_SIZE),
    "latents_std": _list(PositiveReal, MAX_SIZE),
}

_optional: dict[str, Any] = {name: (annotation, None) for name, annotation in _FIELDS.items()}
# Strict mode rejects 8.0, "8" and true as integers.
_Fields = pydantic.create_model("_Fields", __config__=pydantic.ConfigDict(strict=True, extra="forbid"), **_optional)


# --- Reading ---------------------------------------------------------------------------------------------------------


def class_name(values: Mapping[str, Any], file: Path) -> str:
    """Return the model class of a config.json, under the name used by the layout.

    Raises:
        InputError: the file names no class.
    """
    architectures = values.get("architectures")
    found = values.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "")
    if not isinstance(found, str) or not found:
        raise InputError(
            f"{file}: no model class found; expected one, such as WanModel, under _class_name or architectures"
        )
    return found


def read_config(
    values: Mapping[str, Any],
    file: Path,
    schema: Schema,
    architecture: type[Config],
    inferred: Mapping[str, Any] = _NOTHING,
) -> Config:
    """Build the architecture that a config.json describes.

    Args:
        values: the content of `file`.
        inferred: fields that are not in the file but were inferred from the shapes of the tensors.

    Raises:
        InputError: a key is missing or unknown, or its value has the wrong type, is out of range, or is not that of a
            Wan2.1 text-to-video model.
    """
    ours = schema.class_name.startswith("tfm_jax.")
    for key in schema.keys.values():
        if key not in values and not ours:
            raise InputError(f"{file}: {key} is missing; expected it in the config.json of {schema.class_name}")
    names = {**schema.keys, **schema.optional}
    unknown = values.keys() - names.values() - {"_class_name"}
    if ours and unknown:
        raise InputError(f"{file}: unknown field {short_repr(min(unknown))}; expected one of {', '.join(names)}")
    named = {field: values[key] for field, key in names.items() if key in values}
    config = build_config({**inferred, **named}, file, architecture, names)
    _check_fixed(values, file, schema)
    return config


def _check_fixed(values: Mapping[str, Any], file: Path, schema: Schema) -> None:
    copied = {key: values[schema.keys[ours]] for key, ours in schema.copies.items()}
    for key, expected in {**schema.fixed, **copied}.items():
        value = values.get(key, expected)
        if value != expected or type(value) is not type(expected):
            other = schema.copies.get(key)
            reason = f"the same as {schema.keys[other]}" if other else "as in every Wan2.1 text-to-video model"
            raise InputError(f"{file}: {key} is {short_repr(value)}; expected {short_repr(expected)}, {reason}")


def build_config(
    fields: Mapping[str, Any], file: Path, architecture: type[Config], names: Mapping[str, str] = _NOTHING
) -> Config:
    """Validate fields and build an architecture from them; `names` maps our fields to their keys in the file.

    Raises:
        InputError: a field is missing or unknown, a value has the wrong type or is out of range, or two values are
            inconsistent.
    """
    valid = validate(_Fields, fields, file, names).model_dump(exclude_unset=True)
    if architecture is TransformerConfig:
        _fit_heads(valid, file, names)
    allowed = dataclasses.fields(architecture)
    missing = {field.name for field in allowed if field.default is dataclasses.MISSING} - valid.keys()
    unknown = valid.keys() - {field.name for field in allowed}
    if missing or unknown:
        problem = (
            f"{min(missing)} is missing; expected" if missing else f"unknown field {min(unknown)}; expected one of"
        )
        raise InputError(f"{file}: {problem} {', '.join(field.name for field in allowed)}")
    try:
        config = architecture(**valid)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if isinstance(config, TextEncoderConfig) and config.max_distance <= config.buckets // 4:
        raise InputError(
            f"{file}: {names.get('max_distance', 'max_distance')} is {config.max_distance}; expected more than "
            f"{config.buckets // 4} for {config.buckets} buckets"
        )
    return config


def _fit_heads(fields: dict[str, Any], file: Path, names: Mapping[str, str]) -> None:
    """Check the width of a head. If the file gives that instead of the total width, compute the total width."""
    if "head_dim" in fields:
        fields["dim"] = fields["heads"] * fields.pop("head_dim")
    if not {"dim", "heads"} <= fields.keys():
        return
    head_width, rest = divmod(fields["dim"], fields["heads"])
    # Rotary embeddings rotate pairs of channels for each of three axes, so a head needs at least six channels.
    if rest or head_width < 6 or head_width % 2 or fields["dim"] > MAX_SIZE:
        raise InputError(
            f"{file}: {names.get('heads', 'heads')} is {fields['heads']} for a width of {fields['dim']}; expected an "
            f"even head width of at least 6 and a total width of at most {MAX_SIZE}"
        )


# --- Writing ---------------------------------------------------------------------------------------------------------


def config_json(component: str, layout: Layout, config: Any) -> dict[str, Any]:
    """Return the content of a network's config.json, for `read_config` and for other programs that use the layout."""
    schema = SCHEMAS[component, layout]
    values: dict[str, Any] = {"_class_name": schema.class_name}
    if schema.class_name == "UMT5EncoderModel":  # transformers uses another key for the class
        values = {"architectures": [schema.class_name], "num_decoder_layers": config.layers}
    return {
        **values,
        **{key: getattr(config, ours) for ours, key in schema.keys.items()},
        **{key: getattr(config, ours) for key, ours in schema.copies.items()},
        **schema.written,
        **{
            key: getattr(config, ours)
            for ours, key in schema.optional.items()
            if getattr(config, ours) != getattr(type(config), ours)
        },
    }
