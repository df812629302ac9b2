"""The training of the embedded model from random weights, much shortened, and its parts."""

import contextlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax import arrays, interrupts
from tfm_jax.errors import InputError, StoppedEarly
from tfm_jax.moving_shapes.pretraining import fitting
from tfm_jax.moving_shapes.pretraining.autoencoder import (
    NUM_NORMALISED,
    Phase,
    VaeRecipe,
    encode_clips,
    psnr,
    train_vae,
)  # fmt: skip
from tfm_jax.moving_shapes.pretraining.base import BaseRecipe, pad_text
from tfm_jax.moving_shapes.pretraining.network import make_optimizer
from tfm_jax.moving_shapes.pretraining.recipe import Recipe, pretrain
from tfm_jax.moving_shapes.pretraining.scenes import VAE_LAWS, Purpose, draw_clips, draw_scene
from tfm_jax.moving_shapes.world import make_scene
from tfm_jax.train.metrics import read_metrics
from tfm_jax.train.watching import Reports
from tfm_jax.wan import load_text_encoder, load_tokenizer, load_transformer, load_vae
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.tokenizer import encode_prompts
from tfm_jax.wan.transformer import TransformerConfig
from tfm_jax.wan.vae import VaeConfig

pytestmark = pytest.mark.slow  # compiling the steps of the autoencoder takes minutes

TINY = Recipe(
    vae=VaeConfig(base_dim=4, num_res_blocks=1),
    transformer=TransformerConfig(dim=32, ffn_dim=64, heads=2, layers=2, text_dim=16),
    text_encoder=TextEncoderConfig(vocab_size=256, dim=16, heads=2, head_dim=8, ffn_dim=32, layers=1),
    base_clips=6,
    held_out=2,
    samples=2,
    train_vae=VaeRecipe((Phase(2, 1, 32, 4), Phase(2, 5, 32, 2))),
    train_base=BaseRecipe(steps=4, batch=4, padded_every=2),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining") / "wan_tiny"
    pretrain(folder, TINY)
    return folder


def test_the_result_is_a_model_that_every_program_reads(made):
    transformer, vae = load_transformer(made / "model", jnp.float32), load_vae(made / "model")
    encoder = load_text_encoder(made / "model", jnp.float32)
    text = jnp.asarray(arrays.pad_text(encode_prompts(load_tokenizer(made / "model"), encoder, ["a red disc"]), 512))
    latents = vae.encode(jnp.zeros((1, 5, 16, 16, 3)))
    assert transformer(latents, jnp.array([500.0]), text).shape == latents.shape
    index = json.loads((made / "model" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "WanPipeline"


def test_what_is_trained_is_what_is_kept(made):
    """Every step is logged, and the normalised latents have mean 0 and a deviation of at most 1."""
    assert [line["step"] for line in read_metrics(made / "vae.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in read_metrics(made / "base.jsonl")] == [1, 2, 3, 4]
    clips, _ = draw_clips(Purpose.NORMALISATION, 0, NUM_NORMALISED, VAE_LAWS)
    latents = encode_clips(load_vae(made / "model"), clips)
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=2e-2)
    assert (latents.std((0, 1, 2, 3)) <= 1.01).all()  # the deviation of the posterior makes up the rest


def test_a_complete_stage_is_not_repeated(made, tmp_path):
    with pytest.raises(InputError, match="already complete; expected a new folder"):
        pretrain(made, TINY)
    before = (made / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (made / "model").rename(tmp_path / "model")
    (made / "samples").rename(tmp_path / "samples")
    pretrain(made, TINY)
    assert (made / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    for file in sorted((made / "model").rglob("*.safetensors")):  # the repeated stage gives the same weights
        assert file.read_bytes() == (tmp_path / "model" / file.relative_to(made / "model")).read_bytes()


def test_chunks_that_are_unrolled_give_the_same_latents(made):
    vae = load_vae(made / "model")
    clips = np.stack([make_scene(np.random.default_rng(n), frames=9).pixels for n in range(2)])
    expected = vae.encode(jnp.asarray(clips, jnp.float32) / 127.5 - 1)
    np.testing.assert_allclose(encode_clips(vae, clips), expected, atol=1e-4)


def test_the_autoencoder_learns(tmp_path):
    clips = np.stack([make_scene(np.random.default_rng(n), frames=1, laws=["still"]).pixels for n in range(8)])
    short, long = (
        train_vae(TINY.vae, VaeRecipe((Phase(steps, 1, 64, 4),)), 0, tmp_path / f"{steps}") for steps in (1, 60)
    )
    assert psnr(long, clips) > psnr(short, clips) + 3


def test_an_interrupted_training_gives_the_same_weights(made, tmp_path, monkeypatch):
    """Both stages are stopped after every step, once by an error instead of a signal, and started again."""
    monkeypatch.setattr(fitting, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    add, fail_at = Reports.add, {2}

    def add_and_stop(self, step, report, clips):
        add(self, step, report, clips)
        if step in fail_at:
            fail_at.remove(step)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Reports, "add", add_and_stop)
    monkeypatch.setattr(interrupts, "requested", lambda: "SIGTERM")
    for _ in range(20):
        with contextlib.suppress(StoppedEarly, OSError):
            pretrain(tmp_path, TINY)
            break
    assert not fail_at
    for file in sorted((made / "model").rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "model" / file.relative_to(made / "model")).read_bytes()
    assert [line["step"] for line in read_metrics(tmp_path / "vae.jsonl")] == [1, 2, 3, 4]


def test_a_checkpoint_of_other_settings_is_refused(made, tmp_path):
    shutil.copytree(made / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(InputError, match="other settings"):
        pretrain(tmp_path, TINY, seed=1)


def test_scenes_for_different_purposes_differ():
    first, second = (draw_scene(purpose, 0, 0, laws=["uniform"]) for purpose in (Purpose.BASE, Purpose.TOKENIZER))
    assert (first.positions != second.positions).any()


def test_text_is_cut_off_at_the_mask():
    text = pad_text(jnp.ones((1, 3, 2)), jnp.array([[1, 1, 0, 0, 0]]))
    assert text[0, :, 0].tolist() == [1, 1, 0, 0, 0]


def test_muon_is_for_kernels_alone():
    """Muon orthogonalises stacked kernels layer by layer; norms and embeddings get Adam."""
    weights = {"blocks": {"kernel": jnp.ones((2, 4, 6)), "scale": jnp.ones((2, 4))}, "embedding": jnp.ones((8, 4))}
    optimizer = make_optimizer(1.0, 0.5, 10)
    rng = np.random.default_rng(0)
    gradient = {
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32), "scale": jnp.ones((2, 4))},
        "embedding": jnp.full((8, 4), 3.0),
    }
    state = optimizer.init(weights)
    _, state = optimizer.update(gradient, state, weights)  # the warm-up starts at zero
    updates, _ = optimizer.update(gradient, state, weights)
    for layer in np.asarray(updates["blocks"]["kernel"]):
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() / singular.min() < 2
    np.testing.assert_allclose(updates["blocks"]["scale"], updates["blocks"]["scale"][0, 0], rtol=1e-5)
    np.testing.assert_allclose(updates["embedding"], updates["blocks"]["scale"][0, 0], rtol=1e-5)


def test_a_share_of_the_recipe():
    full, short = Recipe(), Recipe().shortened(0.01)
    assert (short.base_clips, short.train_base.steps) == (full.base_clips // 100, full.train_base.steps // 100)
    assert [phase.steps for phase in short.train_vae.phases] == [phase.steps // 100 for phase in full.train_vae.phases]
    assert Recipe().shortened(1.0) == full
