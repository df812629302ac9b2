"""config.json of every network in every layout: round trips, and errors for wrong values."""

import dataclasses
import json
from pathlib import Path

import pytest

from tfm_jax.errors import InputError
from tfm_jax.wan.config_json import SCHEMAS, class_name, config_json, read_config
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.transformer import TransformerConfig
from tfm_jax.wan.vae import VaeConfig

FILE = Path("model/config.json")
CONFIGS = {
    "transformer": TransformerConfig(48, 96, heads=4, layers=2, text_dim=20, freq_dim=32, channels=8, eps=1e-5),
    "vae": VaeConfig(
        base_dim=8,
        z_dim=2,
        dim_mult=(1, 2),
        num_res_blocks=1,
        temporal_downsample=(True,),
        latents_mean=(0.1, -3.0),
        latents_std=(0.5, 2.0),
    ),
    "text_encoder": TextEncoderConfig(
        vocab_size=40, dim=20, heads=2, head_dim=6, ffn_dim=24, layers=2, buckets=16, max_distance=64, eps=1e-5
    ),
}


def write(component, layout):
    return json.loads(json.dumps(config_json(component, layout, CONFIGS[component])))


def read(values, component, layout):
    known = {"text_dim": 20} if (component, layout) == ("transformer", "original") else {}
    return read_config(values, FILE, SCHEMAS[component, layout], type(CONFIGS[component]), known)


@pytest.mark.parametrize(("component", "layout"), SCHEMAS)
def test_there_and_back(component, layout):
    values = write(component, layout)
    assert class_name(values, FILE) == SCHEMAS[component, layout].class_name
    assert read(values, component, layout) == CONFIGS[component]
    defaults = dataclasses.replace(CONFIGS[component], **({"eps": 1e-6} if component != "vae" else {}))
    if layout == "tfm_jax" and component != "vae":
        assert read({key: value for key, value in values.items() if key != "eps"}, component, layout) == defaults


@pytest.mark.parametrize("layout", ["diffusers", "original", "tfm_jax"])
def test_text_len(layout):
    """A file without it means 512. For diffusers, which does not know the key, only other values are written."""
    values = write("transformer", layout)
    assert ("text_len" in values) == (layout != "diffusers")
    values.pop("text_len", None)
    assert read(values, "transformer", layout).text_len == 512
    config = dataclasses.replace(CONFIGS["transformer"], text_len=64)
    values = json.loads(json.dumps(config_json("transformer", layout, config)))
    assert read(values, "transformer", layout) == config


HUGE = 10**9
TRANSFORMER = ("transformer", "diffusers")
ORIGINAL = ("transformer", "original")
VAE = ("vae", "diffusers")
TEXT = ("text_encoder", "diffusers")
OURS = ("vae", "tfm_jax")


@pytest.mark.parametrize(
    ("schema", "key", "value", "words"),
    [
        (TRANSFORMER, "num_layers", 8.0, r"num_layers is 8\.0; expected a valid integer"),
        (TRANSFORMER, "num_layers", "8", "num_layers is '8'; expected a valid integer"),
        (TRANSFORMER, "num_layers", True, "num_layers is True; expected a valid integer"),
        (TRANSFORMER, "num_layers", HUGE, "num_layers is 1000000000; expected less than or equal to 1000"),
        (TRANSFORMER, "num_layers", 10**400, "num_layers is 10+\\.\\.\\.0+; expected less than"),
        (TRANSFORMER, "num_layers", {"a": [1] * 1000}, r"num_layers is \{'a': \[1, .*\.\.\.\]\}; expected"),
        (TRANSFORMER, "ffn_dim", HUGE, "ffn_dim is 1000000000; expected less than or equal to 1048576"),
        (TRANSFORMER, "attention_head_dim", 2**20, "num_attention_heads is 4 for a width of 4194304; expected"),
        (TRANSFORMER, "attention_head_dim", 7, "num_attention_heads is 4 for a width of 28; expected an even head"),
        (TRANSFORMER, "eps", None, "eps is None; expected a valid number"),
        (TRANSFORMER, "eps", -1e-6, "eps is -1e-06; expected greater than 0"),
        (TRANSFORMER, "freq_dim", -4, "freq_dim is -4; expected greater than or equal to 1"),
        (TRANSFORMER, "freq_dim", "256", "freq_dim is '256'; expected a valid integer"),
        (TRANSFORMER, "freq_dim", 33, "freq_dim is 33; expected a multiple of 2"),
        (TRANSFORMER, "out_channels", 36, "out_channels is 36; expected 8, the same as in_channels"),
        (TRANSFORMER, "cross_attn_norm", 1, "cross_attn_norm is 1; expected True"),
        (ORIGINAL, "num_heads", 5, "num_heads is 5 for a width of 48; expected an even head"),
        (ORIGINAL, "model_type", "i2v", "model_type is 'i2v'; expected 't2v'"),
        (ORIGINAL, "text_len", 513, "text_len is 513; expected less than or equal to 512"),
        (VAE, "latents_std", "1", "latents_std is '1'; expected a valid list"),
        (VAE, "latents_std", [0, 0], r"latents_std\[0\] is 0; expected greater than 0"),
        (VAE, "latents_std", [1, "a"], r"latents_std\[1\] is 'a'; expected a valid number"),
        (VAE, "latents_mean", [1, 2, 3], "latents_mean has 3 values; expected z_dim = 2"),
        (VAE, "temperal_downsample", [1], r"temperal_downsample\[0\] is 1; expected a valid boolean"),
        (VAE, "temperal_downsample", [True, True], "temporal_downsample has 2 values; expected 1, one fewer"),
        (VAE, "dim_mult", [], r"dim_mult is \[\]; .* at least 1 item"),
        (TEXT, "relative_attention_num_buckets", 2, "relative_attention_num_buckets is 2; expected greater than or"),
        (TEXT, "relative_attention_max_distance", 4, "_max_distance is 4; expected more than 4 for 16 buckets"),
        (TEXT, "feed_forward_proj", "relu", "feed_forward_proj is 'relu'; expected 'gated-gelu'"),
        (OURS, "z_dim", 0, "z_dim is 0; expected greater than or equal to 1"),
        (OURS, "shortcut", 1, "unknown field 'shortcut'; expected one of base_dim, z_dim"),
    ],
)
def test_wrong_values(schema, key, value, words):
    with pytest.raises(InputError, match=f"^{FILE}: .*{words}") as caught:
        read(write(*schema) | {key: value}, *schema)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("component", "layout"), [TRANSFORMER, ORIGINAL, VAE, TEXT])
def test_missing_values(component, layout):
    for key in SCHEMAS[component, layout].keys.values():
        values = write(component, layout)
        del values[key]
        with pytest.raises(InputError, match=f"{FILE}: {key} is missing; expected it in the config.json of "):
            read(values, component, layout)


def test_our_own_layout_needs_what_has_no_default():
    with pytest.raises(InputError, match=f"{FILE}: dim is missing; expected dim, ffn_dim"):
        read({"ffn_dim": 8, "heads": 1, "layers": 1}, "transformer", "tfm_jax")


@pytest.mark.parametrize("values", [{}, {"_class_name": {}}, {"_class_name": ["WanModel"]}, {"architectures": [5]}])
def test_a_model_without_a_class(values):
    with pytest.raises(InputError, match=f"{FILE}: no model class found; expected one, such as WanModel"):
        class_name(values, FILE)
