"""The config.json of every network in every layout <-> our architecture dataclasses, as tables.

A file says some of our fields under its own keys (`keys`), some of them twice (`copies`), and some things that have one
value in every Wan2.1 text-to-video model (`fixed`). Values are validated here, so that what a network is built from has
the right kind and a sensible size.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import pydantic
from pydantic import Field, Strict

from tfm_jax.errors import InputError
from tfm_jax.inputs import checked, shown
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.transformer import PATCH, TransformerConfig
from tfm_jax.wan.vae import VaeConfig

Layout = Literal["diffusers", "original", "tfm_jax"]
Config = TypeVar("Config", TransformerConfig, VaeConfig, TextEncoderConfig)

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Format(NamedTuple):
    """How a config.json says what an architecture is."""

    class_name: str
    keys: Mapping[str, str]
    """Our field, or property -> key in the file; all of them are required."""
    copies: Mapping[str, str] = _NOTHING
    """Key -> our field that it must agree with, if it is there."""
    fixed: Mapping[str, Any] = _NOTHING
    """Key -> the value it must have, if it is there."""
    written: Mapping[str, Any] = _NOTHING
    """Key -> value that other programs want to find, in addition to the above."""


def _own(name: str, config: type) -> Format:
    return Format(f"tfm_jax.{name}", {field.name: field.name for field in dataclasses.fields(config)})


_T2V = {
    "patch_size": list(PATCH),
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}

FORMATS: dict[tuple[str, Layout], Format] = {
    ("transformer", "diffusers"): Format(
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
        copies={"out_channels": "channels"},
        fixed=_T2V,
        written=_T2V,
    ),
    ("transformer", "original"): Format(
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
        copies={"out_dim": "channels"},
        fixed={"model_type": "t2v", "text_len": 512},
        written={"model_type": "t2v", "text_len": 512},
    ),
    ("vae", "diffusers"): Format(
        "AutoencoderKLWan",
        {
            "base_dim": "base_dim",
            "z_dim": "z_dim",
            "dim_mult": "dim_mult",
            "num_res_blocks": "num_res_blocks",
            "temporal_downsample": "temperal_downsample",  # sic
            "latents_mean": "latents_mean",
            "latents_std": "latents_std",
        },
        fixed={"attn_scales": [], "is_residual": False, "patch_size": None, "decoder_base_dim": None},
        written={"attn_scales": [], "dropout": 0.0},
    ),
    ("text_encoder", "diffusers"): Format(
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
    ("transformer", "tfm_jax"): _own("transformer", TransformerConfig),
    ("vae", "tfm_jax"): _own("vae", VaeConfig),
    ("text_encoder", "tfm_jax"): _own("text_encoder", TextEncoderConfig),
}

MOST = 2**20
"""Four times the vocabulary of umT5, which is the largest size of Wan2.1."""

Size = Annotated[int, Field(ge=1, le=MOST)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Real = Annotated[float, Field(allow_inf_nan=False)]
PositiveReal = Annotated[Real, Field(gt=0)]


def _list(item: Any, at_most: int) -> Any:
    """A list in JSON, a tuple in our dataclasses."""
    return Annotated[tuple[item, ...], Strict(False), Field(min_length=1, max_length=at_most)]


_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("dim", "ffn_dim", "heads", "head_dim", "text_dim", "channels", "base_dim", "z_dim"), Size),
    **dict.fromkeys(("vocab_size", "max_distance"), Size),
    "layers": Layers,
    "freq_dim": Annotated[Size, Field(multiple_of=2)],
    "buckets": Annotated[Size, Field(ge=4)],
    "eps": Annotated[PositiveReal, Field(lt=1)],
    "num_res_blocks": Annotated[int, Field(ge=1, le=100)],
    "dim_mult": _list(Annotated[int, Field(ge=1, le=1000)], 10),
    "temporal_downsample": _list(bool, 10),
    "latents_mean": _list(Real, MOST),
    "latents_std": _list(PositiveReal, MOST),
}

_optional: dict[str, Any] = {name: (kind, None) for name, kind in _FIELDS.items()}
# Strict: 8.0, "8" and true are not whole numbers.
_Fields = pydantic.create_model("_Fields", __config__=pydantic.ConfigDict(strict=True, extra="forbid"), **_optional)


# --- Reading ---------------------------------------------------------------------------------------------------------


def class_name(values: Mapping[str, Any], file: Path) -> str:
    """The class of the model that a config.json is for, as diffusers or transformers name it.

    Raises:
        InputError: it names none.
    """
    architectures = values.get("architectures")
    found = values.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "")
    if not isinstance(found, str) or not found:
        raise InputError(
            f"{file}: model class is {shown(found)}; expected _class_name or architectures, such as WanModel"
        )
    return found


def read_config(
    values: Mapping[str, Any], file: Path, form: Format, architecture: type[Config], known: Mapping[str, Any] = _NOTHING
) -> Config:
    """The architecture that a config.json describes.

    Args:
        values: the content of `file`.
        known: fields that the layout keeps elsewhere, such as in the shapes of tensors.

    Raises:
        InputError: a key is missing, its value is of the wrong kind or size, or not that of Wan2.1 text-to-video.
    """
    own = form.class_name.startswith("tfm_jax.")
    for key in form.keys.values():
        if key not in values and not own:
            raise InputError(f"{file}: {key} is missing; expected it in the config.json of a {form.class_name}")
    unknown = values.keys() - form.keys.values() - {"_class_name"}
    if own and unknown:
        raise InputError(f"{file}: unknown field {shown(min(unknown))}; expected {', '.join(form.keys)}")
    named = {ours: values[key] for ours, key in form.keys.items() if key in values}
    config = build_config({**known, **named}, file, architecture, form.keys)
    _check_fixed(values, file, form)
    return config


def _check_fixed(values: Mapping[str, Any], file: Path, form: Format) -> None:
    copied = {key: values[form.keys[ours]] for key, ours in form.copies.items()}
    for key, expected in {**form.fixed, **copied}.items():
        value = values.get(key, expected)
        if value != expected or type(value) is not type(expected):
            raise InputError(f"{file}: {key} is {shown(value)}; expected {shown(expected)}, as in Wan2.1 text-to-video")


def build_config(
    fields: Mapping[str, Any], file: Path, architecture: type[Config], names: Mapping[str, str] = _NOTHING
) -> Config:
    """An architecture from its fields, validated; `names` is what the file calls them.

    Raises:
        InputError: a value is of the wrong kind or size, or two of them do not fit together.
    """
    valid = checked(_Fields, fields, file, names).model_dump(exclude_unset=True)
    if architecture is TransformerConfig:
        _fit_heads(valid, file, names)
    own = dataclasses.fields(architecture)
    missing = {field.name for field in own if field.default is dataclasses.MISSING} - valid.keys()
    unknown = valid.keys() - {field.name for field in own}
    if missing or unknown:
        problem = f"{min(missing)} is missing" if missing else f"unknown field {min(unknown)}"
        raise InputError(f"{file}: {problem}; expected {', '.join(field.name for field in own)}")
    try:
        config = architecture(**valid)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if isinstance(config, TextEncoderConfig) and config.max_distance <= config.buckets // 4:
        raise InputError(
            f"{file}: {config.buckets} buckets end at distance {config.max_distance}; expected a larger one"
        )
    return config


def _fit_heads(fields: dict[str, Any], file: Path, names: Mapping[str, str]) -> None:
    """Set dim where the file has the width of a head instead, and check one against the other."""
    if "head_dim" in fields:
        fields["dim"] = fields["heads"] * fields.pop("head_dim")
    if not {"dim", "heads"} <= fields.keys():
        return
    width, rest = divmod(fields["dim"], fields["heads"])
    if (
        rest or width < 6 or width % 2 or fields["dim"] > MOST
    ):  # rotary positions turn pairs of channels along three axes
        raise InputError(
            f"{file}: {names.get('heads', 'heads')} is {fields['heads']} and the width {fields['dim']}; expected heads "
            f"of an even width, 6 or more, and at most {MOST} in all"
        )


# --- Writing ---------------------------------------------------------------------------------------------------------


def config_json(component: str, layout: Layout, config: Any) -> dict[str, Any]:
    """The config.json of a network: what `read_config` reads back, and what the layout's own programs expect."""
    form = FORMATS[component, layout]
    values: dict[str, Any] = {"_class_name": form.class_name}
    if form.class_name == "UMT5EncoderModel":  # transformers names classes in its own way
        values = {"architectures": [form.class_name], "num_decoder_layers": config.layers}
    return {
        **values,
        **{key: getattr(config, ours) for ours, key in form.keys.items()},
        **{key: getattr(config, ours) for key, ours in form.copies.items()},
        **form.written,
    }
