"""The diffusion transformer against diffusers' WanTransformer3DModel with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.wan_reference import SIZES, inputs, reference_transformer, relative, run_reference, write_original

from tfm_jax.wan import load_transformer
from tfm_jax.wan.attention import attention, chunked
from tfm_jax.wan.components import TRANSFORMER, abstract_model, named_parameters
from tfm_jax.wan.names import transformer_rows
from tfm_jax.wan.rotary import apply_rotary, rotary_tables
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer

run = jax.jit(WanTransformer.__call__)

# Original name -> diffusers name and shape, for some tensors of the published 14B model.
NAMES = {
    "patch_embedding.weight": ("patch_embedding.weight", (5120, 16, 1, 2, 2)),
    "text_embedding.0.weight": ("condition_embedder.text_embedder.linear_1.weight", (5120, 4096)),
    "time_embedding.2.bias": ("condition_embedder.time_embedder.linear_2.bias", (5120,)),
    "time_projection.1.weight": ("condition_embedder.time_proj.weight", (30720, 5120)),
    "blocks.39.modulation": ("blocks.39.scale_shift_table", (1, 6, 5120)),
    "blocks.7.self_attn.o.weight": ("blocks.7.attn1.to_out.0.weight", (5120, 5120)),
    "blocks.7.cross_attn.norm_k.weight": ("blocks.7.attn2.norm_k.weight", (5120,)),
    "blocks.0.norm3.bias": ("blocks.0.norm2.bias", (5120,)),
    "blocks.0.ffn.0.weight": ("blocks.0.ffn.net.0.proj.weight", (13824, 5120)),
    "blocks.0.ffn.2.weight": ("blocks.0.ffn.net.2.weight", (5120, 13824)),
    "head.modulation": ("scale_shift_table", (1, 2, 5120)),
    "head.head.weight": ("proj_out.weight", (64, 5120)),
}


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 6, 10)])
@pytest.mark.parametrize("size", SIZES)
def test_velocity_equals_diffusers(tmp_path, size, shape, layout):
    config = SIZES[size]
    reference = reference_transformer(config)
    if layout == "diffusers":
        reference.save_pretrained(tmp_path / "model" / "transformer")
    else:
        write_original(reference, config, tmp_path / "model")
    model = load_transformer(tmp_path / "model", dtype=jnp.float32)
    batch = inputs(config, *shape)
    assert relative(run(model, **batch), run_reference(reference, batch)) <= 1e-5


def test_bfloat16_points_the_same_way(tmp_path):
    config = SIZES["many heads"]
    reference = reference_transformer(config)
    reference.save_pretrained(tmp_path / "transformer")
    batch = inputs(config, 2, 3, 6, 10)
    model = load_transformer(tmp_path, dtype=jnp.bfloat16)
    assert model.blocks.ffn.up.kernel.dtype == jnp.bfloat16
    ours, theirs = np.asarray(run(model, **batch)).ravel(), run_reference(reference, batch).ravel()
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) >= 0.999


def test_gradient_equals_diffusers(tmp_path):
    """Gradients pass through every block, with scan and rematerialisation."""
    import torch

    config = SIZES["small"]
    reference = reference_transformer(config)
    reference.save_pretrained(tmp_path / "transformer")
    batch = inputs(config, 1, 2, 4, 6)
    model = load_transformer(tmp_path, dtype=jnp.float32)
    ours = jax.grad(lambda x: jnp.sum(run(model, x, batch["timestep"], batch["text"]) ** 2))(batch["latents"])

    latents = torch.from_numpy(batch["latents"]).permute(0, 4, 1, 2, 3).contiguous().requires_grad_()
    out = reference(latents, torch.from_numpy(batch["timestep"]), torch.from_numpy(batch["text"])).sample
    (theirs,) = torch.autograd.grad((out**2).sum(), latents)
    assert relative(ours, theirs.permute(0, 2, 3, 4, 1).numpy()) <= 1e-5


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=30), 825, 1_418_996_800),
        (TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40), 1095, 14_288_491_584),
    ],
)
def test_published_models_are_counted_exactly(config, tensors, parameters):
    state = nnx.state(abstract_model(TRANSFORMER, config, jnp.bfloat16))
    assert sum(x.size for x in jax.tree.leaves(state)) == parameters
    rows = transformer_rows(config.layers)
    assert len(rows) == len({row.original for row in rows}) == len({row.diffusers for row in rows}) == tensors


def test_names_are_those_of_the_published_files():
    config = TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)
    module = abstract_model(TRANSFORMER, config, jnp.bfloat16)
    shapes = {name: variable.shape for name, variable in named_parameters(module).items()}
    rows = {row.original: row for row in transformer_rows(config.layers)}
    for original, (diffusers, shape) in NAMES.items():
        row = rows[original]
        assert row.diffusers == diffusers
        assert row.torch_shape(shapes[row.ours]) == shape


@pytest.mark.parametrize("queries", [7, 513, 1024])
def test_attention_in_chunks_is_exact(queries, monkeypatch):
    monkeypatch.setattr(chunked, "QUERY_CHUNK", 512)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, queries, 3, 8), np.float32)
    k, v = rng.standard_normal((2, 2, 70, 3, 8), np.float32)

    def plain(q):
        scores = np.einsum("bsnk,btnk->bnst", q.astype(np.float64), k) / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bnst,btnk->bsnk", weights / weights.sum(-1, keepdims=True), v)

    assert relative(attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)), plain(q)) < 1e-5

    def of_chunks(size, scores):
        monkeypatch.setattr(chunked, "QUERY_CHUNK", size)
        monkeypatch.setattr(chunked, "SCORES", scores)
        return jax.grad(lambda q: jnp.sum(attention(q, jnp.asarray(k), jnp.asarray(v)) ** 2))(jnp.asarray(q))

    assert relative(of_chunks(64, 2 * 64 * 70), of_chunks(4096, 1 << 30)) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotary_multiplies_pairs_as_complex_numbers(dtype):
    """And its gradient turns them back."""
    rotary = rotary_tables((2, 3, 2), 16)
    turn = np.asarray(rotary[0])[:, ::2] + 1j * np.asarray(rotary[1])[:, ::2]
    x, gradient = (jax.random.normal(jax.random.key(n), (2, 12, 3, 16), dtype) for n in range(2))
    result, pull_back = jax.vjp(lambda x: apply_rotary(x, rotary), x)
    for ours, given, factor in ((result, x, turn), (pull_back(gradient)[0], gradient, turn.conj())):
        pairs = np.asarray(given, np.float32).reshape(2, 12, 3, 8, 2)
        expected = (pairs[..., 0] + 1j * pairs[..., 1]) * factor[:, None]
        assert ours.dtype == dtype
        expected = np.stack([expected.real, expected.imag], -1).reshape(x.shape)
        assert relative(np.asarray(ours, np.float32), expected) < (1e-6 if dtype == jnp.float32 else 4e-3)


def test_rotary_positions_split_the_head_as_wan_does():
    cos, sin = rotary_tables((3, 5, 7), 128)
    assert cos.shape == sin.shape == (3 * 5 * 7, 128)
    angle = np.arctan2(np.asarray(sin), np.asarray(cos)).reshape(3, 5, 7, 64, 2)
    assert np.array_equal(angle[..., 0], angle[..., 1])  # both channels of a pair
    angle = angle[..., 0]
    assert np.allclose(angle[2, 0, 0, 0], 2)  # time takes 44 channels, 22 pairs
    assert np.allclose(angle[0, 3, 0, 22], 3)  # then height, 42
    assert np.allclose(angle[0, 0, 3, 43], 3)  # then width, 42
    assert not angle[2, 0, 0, 22:].any()
