"""Training on a base in int8: a run from its start to the LoRA file, and how much the rounding changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.training_runs import assert_same, computed, saved, start

from tfm_jax.arrays import pad_text
from tfm_jax.checkpoint import Checkpoints, flatten
from tfm_jax.config import LoraConfig, ObjectiveConfig, load
from tfm_jax.lora.adapters import attach_lora, init_lora, split_lora
from tfm_jax.lora.files import read_lora
from tfm_jax.moving_shapes.world import make_scene
from tfm_jax.objective import draw, objective_loss
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.train.export import export
from tfm_jax.wan import find_base, load_base, load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.quantization import quantize_linears
from tfm_jax.wan.tokenizer import encode_prompts
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer


def test_a_run_from_its_start_to_the_lora_file(options, two_steps, tmp_path):
    """Resuming changes no bit. The losses are near those on the base as it is, which is another base."""
    ours = [*options, "--model.quantize=int8"]
    whole = start([*ours, "--train.steps=3", f"--train.output={tmp_path}/whole"])
    parts = start([*ours, "--train.steps=2"])
    start([*ours, "--train.steps=3"], resume=True)
    assert_same(saved(whole, 3), saved(parts, 3))
    losses, plain = ([line["loss"] for line in computed(run)][:2] for run in (whole, two_steps))
    assert losses == pytest.approx(plain, rel=0.01)
    assert losses != plain
    bases = [Checkpoints(run / "checkpoints").newest_metadata()["base"] for run in (whole, two_steps)]
    assert bases[0] != bases[1]
    export(whole, tmp_path / "lora.safetensors", "comfy", np.dtype(np.float32))
    assert len(read_lora(tmp_path / "lora.safetensors").adapters) == 30


# --- Accuracy --------------------------------------------------------------------------------------------------------


def loss_and_gradient(model: WanTransformer, clean: jax.Array, text: jax.Array) -> tuple[float, np.ndarray]:
    """Return the TFM loss and its gradient in adapters of rank 8 that are away from their start."""
    attach_lora(model, LoraConfig(rank=8, alpha=8))
    init_lora(model, jax.random.key(1))
    graph, lora, frozen = split_lora(model)
    leaves, structure = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.02 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    draws = draw(jax.random.key(3), clean.shape, ObjectiveConfig())

    @jax.jit
    def run(lora, frozen):
        def loss(lora):
            return objective_loss(nnx.merge(graph, lora, frozen), clean, text, draws, ObjectiveConfig())[0]

        return jax.value_and_grad(loss)(lora)

    loss, gradient = run(jax.tree.unflatten(structure, moved), frozen)
    return float(loss), np.concatenate([np.ravel(x) for x in flatten(gradient).values()])


def compare(what: str, ours: tuple[float, np.ndarray], exact: tuple[float, np.ndarray]) -> tuple[float, float]:
    """Return, and print for docs/training.md, the relative difference of the losses and the cosine of the gradients."""
    difference = abs(ours[0] / exact[0] - 1)
    cosine = float(ours[1] @ exact[1] / np.linalg.norm(ours[1]) / np.linalg.norm(exact[1]))
    print(f"\n{what}: loss {100 * difference:.3f} % from float32, cosine of the gradients {cosine:.5f}")
    return difference, cosine


@pytest.mark.slow
def test_accuracy_on_the_embedded_model():
    """On clips of its world, with captions."""
    config = load(SampleRun, "wan_tiny").model
    scenes = [make_scene(np.random.default_rng((5, number))) for number in range(8)]
    pixels = np.stack([scene.pixels for scene in scenes]).astype(np.float32) / 127.5 - 1
    clean = jax.jit(lambda vae, x: vae.encode(x))(load_vae(config.path), jnp.asarray(pixels))
    encoder = load_text_encoder(config.path, jnp.float32)
    length = find_base(config).config.text_len
    embeddings = encode_prompts(load_tokenizer(config.path), encoder, [s.caption for s in scenes], length=length)
    text = jnp.asarray(pad_text(embeddings, length))
    bases = [load_base(model) for model in (dataclasses.replace(config, quantize="int8"), config)]
    difference, cosine = compare("wan_tiny in int8", *(loss_and_gradient(base, clean, text) for base in bases))
    assert 0 < difference < 0.01
    assert 0.99 < cosine < 0.99999


@pytest.mark.slow
def test_accuracy_at_the_widths_of_the_1_3b_model():
    """Two layers with normal weights, on noise: int8 with bfloat16 beside bfloat16 alone."""
    config = TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=2)
    rng = np.random.default_rng(0)
    clean, text = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, 3, 8, 8, 16), (1, 64, 4096)))

    @jax.jit
    def make() -> WanTransformer:
        model = WanTransformer(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
        for number, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model.blocks))):
            if path[-1] == "kernel":
                key, width = jax.random.key(number), variable.shape[-2]
                variable.set_value(jax.random.normal(key, variable.shape) / np.sqrt(width))
        return model

    def rounded(quantized: bool) -> WanTransformer:
        model = make()
        if quantized:
            quantize_linears(model.blocks)
        model.dtype = jnp.bfloat16
        return model

    exact = loss_and_gradient(make(), clean, text)
    for weights in ("bfloat16", "int8"):
        ours = loss_and_gradient(rounded(weights == "int8"), clean, text)
        difference, cosine = compare(f"1.3B widths in bfloat16, weights in {weights}", ours, exact)
        assert 0 < difference < 0.01
        assert 0.99 < cosine < 0.999999
