import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx
from helpers.umt5_reference import diffusers_tensors, from_state_dict, reference_encoder, umt5_config
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from tfm_jax.errors import InputError
from tfm_jax.wan.names import TEXT_ENCODER_ALIASES, text_encoder_rows
from tfm_jax.wan.sizes import text_encoder_sizes
from tfm_jax.wan.text_encoder import TextEncoderConfig, UMT5Encoder, relative_buckets

CONFIGS = [
    TextEncoderConfig(vocab_size=97, dim=32, heads=4, head_dim=8, ffn_dim=48, layers=3),
    TextEncoderConfig(
        vocab_size=50, dim=40, heads=3, head_dim=16, ffn_dim=56, layers=2, buckets=16, max_distance=64, eps=1e-2
    ),
]


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def random_tokens(config: TextEncoderConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Three prompts: full, half full, one token. The padding has random ids, so only the mask identifies it."""
    rng = np.random.default_rng(length)
    lengths = np.array([length, (length + 1) // 2, 1])
    ids = rng.integers(0, config.vocab_size, (3, length), dtype=np.int32)
    return ids, (np.arange(length) < lengths[:, None]).astype(np.int32)


@pytest.fixture(scope="module", params=CONFIGS, ids=["narrow", "wide heads"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def reference(config):
    return reference_encoder(config)


@pytest.fixture(scope="module")
def encoder(config, reference):
    return from_state_dict(config, diffusers_tensors(reference), "diffusers")


@pytest.mark.parametrize("length", [1, 7, 33, 512])
def test_equals_transformers(config, reference, encoder, length):
    ids, mask = random_tokens(config, length)
    expected = reference(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    result = encoder(jnp.asarray(ids), jnp.asarray(mask))
    assert result.dtype == jnp.float32
    assert np.abs(result - expected).max() <= 1e-5 * np.abs(expected).max()


def test_bfloat16(config, reference):
    encoder = from_state_dict(config, diffusers_tensors(reference), "diffusers", jnp.bfloat16)
    ids, mask = random_tokens(config, 65)
    expected = reference(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    result = encoder(jnp.asarray(ids), jnp.asarray(mask))
    assert result.dtype == jnp.bfloat16
    result = np.asarray(result, np.float32)
    cosine = (result * expected).sum(-1) / np.linalg.norm(result, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() >= 0.999


def test_original_layout_gives_the_same_weights(config, reference, encoder):
    tensors = diffusers_tensors(reference)
    original = {row.original: tensors[row.diffusers] for row in text_encoder_rows(config.layers)}
    again = from_state_dict(config, original, "original")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(encoder))


@pytest.mark.parametrize(
    ("original", "diffusers", "ours", "layer"),
    [
        ("token_embedding.weight", "shared.weight", "embedding", None),
        ("norm.weight", "encoder.final_layer_norm.weight", "norm.scale", None),
        (
            "blocks.7.pos_embedding.embedding.weight",
            "encoder.block.7.layer.0.SelfAttention.relative_attention_bias.weight",
            "blocks.attention.position_bias",
            7,
        ),
        ("blocks.23.attn.o.weight", "encoder.block.23.layer.0.SelfAttention.o.weight", "blocks.attention.o.kernel", 23),
        ("blocks.0.norm2.weight", "encoder.block.0.layer.1.layer_norm.weight", "blocks.norm2.scale", 0),
        (
            "blocks.1.ffn.gate.0.weight",
            "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
            "blocks.ffn.gate.kernel",
            1,
        ),
        ("blocks.1.ffn.fc1.weight", "encoder.block.1.layer.1.DenseReluDense.wi_1.weight", "blocks.ffn.up.kernel", 1),
        ("blocks.1.ffn.fc2.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight", "blocks.ffn.down.kernel", 1),
    ],
)
def test_names(original, diffusers, ours, layer):
    (row,) = (row for row in text_encoder_rows(24) if row.original == original)
    assert (row.diffusers, row.ours, row.layer) == (diffusers, ours, layer)


def test_full_size():
    """Abstract umT5-XXL has the published parameter count, and the names and shapes of transformers' model."""
    encoder = nnx.eval_shape(lambda: UMT5Encoder(TextEncoderConfig(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(nnx.state(encoder))
    assert sum(leaf.size for leaf in leaves) == 5_680_910_336
    assert len(leaves) == 2 + 10

    with torch.device("meta"):
        model = UMT5EncoderModel(umt5_config(TextEncoderConfig()))
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    rows = text_encoder_rows(24)
    assert {row.diffusers for row in rows} == {TEXT_ENCODER_ALIASES.get(name, name) for name in shapes}
    assert len({row.original for row in rows}) == len(rows) == 242
    assert TextEncoderConfig(**text_encoder_sizes(shapes)) == TextEncoderConfig()
    for row in rows:
        variable = functools.reduce(getattr, row.ours.split("."), encoder)
        ours = rearrange(np.broadcast_to(0, shapes[row.diffusers]), row.axes).shape
        assert variable.shape == (() if row.layer is None else (24,)) + ours
        assert len(variable.get_metadata()["axes"]) == len(variable.shape)


def test_config_from_shapes():
    config = TextEncoderConfig(vocab_size=50, dim=40, heads=3, head_dim=16, ffn_dim=56, layers=2, buckets=16)
    shapes = {name: tuple(weight.shape) for name, weight in UMT5EncoderModel(umt5_config(config)).state_dict().items()}
    assert TextEncoderConfig(**text_encoder_sizes(shapes)) == config

    original = {row.original: shapes[row.diffusers] for row in text_encoder_rows(config.layers)}
    assert TextEncoderConfig(**text_encoder_sizes(original)) == config

    del shapes["shared.weight"]
    assert TextEncoderConfig(**text_encoder_sizes(shapes)) == config, "encoder.embed_tokens.weight is the same tensor"

    with pytest.raises(InputError, match=r"token_embedding\.weight has shape \[50\]"):
        text_encoder_sizes({**original, "token_embedding.weight": (50,)})

    del original["blocks.0.ffn.gate.0.weight"]
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.gate\.0\.weight is missing"):
        text_encoder_sizes(original)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 64), (32, 100), (8, 20)])
def test_buckets(buckets, max_distance):
    config = UMT5Config(relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance)
    attention = UMT5Attention(config, has_relative_attention_bias=True)
    position = torch.arange(512)
    expected = attention._relative_position_bucket(position[None, :] - position[:, None])
    np.testing.assert_array_equal(relative_buckets(512, buckets, max_distance), expected)


def test_float16_is_refused():
    with pytest.raises(InputError, match="float16"):
        UMT5Encoder(CONFIGS[0], rngs=nnx.Rngs(0), dtype=jnp.float16)
