"""Trains the embedded model from random weights: clips -> autoencoder -> latents -> transformer and text encoder.

The resulting model ships as `tfm_jax/moving_shapes/wan_tiny`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tfm_jax.errors import InputError
from tfm_jax.files import replacing
from tfm_jax.moving_shapes.pretraining.autoencoder import Phase, VaeRecipe, encode_clips, psnr, train_vae
from tfm_jax.moving_shapes.pretraining.base import BaseRecipe, CaptionTokens, train_base
from tfm_jax.moving_shapes.pretraining.quality import evaluate_model
from tfm_jax.moving_shapes.pretraining.scenes import BASE_LAWS, KNOWN_LAWS, Purpose, draw_clips
from tfm_jax.moving_shapes.tokenizer import write_tokenizer
from tfm_jax.wan import load_vae
from tfm_jax.wan.components import TEXT_ENCODER, TRANSFORMER, VAE
from tfm_jax.wan.saving import save, save_model
from tfm_jax.wan.sources import find_source, source_from_module
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.tokenizer import Tokenizer
from tfm_jax.wan.transformer import TransformerConfig
from tfm_jax.wan.vae import VaeConfig

RECIPE_FILE = "recipe.txt"
LATENTS_FILE = "latents.npz"
NUM_CAPTIONS = 2000
"""Number of captions of KNOWN_LAWS from which the tokenizer is built, besides those of the transformer's clips. They
contain the words for motions that fine-tuning teaches."""


class Recipe(NamedTuple):
    """The sizes and training settings of the three networks, and the numbers of clips."""

    vae: VaeConfig = VaeConfig(base_dim=8, dim_mult=(1, 3, 6, 8), num_res_blocks=1)
    transformer: TransformerConfig = TransformerConfig(
        dim=128, ffn_dim=512, heads=4, layers=8, text_dim=64, text_len=64
    )
    text_encoder: TextEncoderConfig = TextEncoderConfig(
        vocab_size=256, dim=64, heads=4, head_dim=16, ffn_dim=128, layers=2
    )
    base_clips: int = 12000
    """Number of clips for the transformer; their laws are BASE_LAWS."""
    held_out: int = 64
    """Number of clips on which the reconstruction is measured; their speeds occur in no clip of the training."""
    samples: int = 96
    """Number of captions for which the finished model samples videos."""
    train_vae: VaeRecipe = VaeRecipe((Phase(600, 1, 32, 16), Phase(2200, 13, 32, 6), Phase(600, 17, 32, 6)))
    train_base: BaseRecipe = BaseRecipe(6000)

    def shortened(self, share: float) -> "Recipe":
        """Return the recipe with the fraction `share` of its clips and steps."""

        def part(number: int, minimum: int) -> int:
            return max(minimum, round(share * number))

        phases = tuple(phase._replace(steps=part(phase.steps, 2)) for phase in self.train_vae.phases)
        return self._replace(
            base_clips=part(self.base_clips, 4),
            held_out=part(self.held_out, 2),
            samples=part(self.samples, 2),
            train_vae=self.train_vae._replace(phases=phases),
            train_base=self.train_base._replace(steps=part(self.train_base.steps, 2)),
        )


def pretrain(output: Path, recipe: Recipe, seed: int = 0) -> None:
    """Write the logs and checkpoints of both stages, the model and samples into `output`, and print its quality.

    A stage whose result exists is skipped. A stage that was interrupted continues from its last checkpoint, and its
    result is the same as without the interruption.

    Raises:
        InputError: all results exist already, or the folder belongs to another recipe or seed.
        StoppedEarly: a signal stopped the training; the same command continues it.
    """
    model = output / "model"
    if (output / "samples").exists():
        raise InputError(f"{output}: already complete; expected a new folder, or one in which some results are missing")
    output.mkdir(parents=True, exist_ok=True)
    _check_recipe(output / RECIPE_FILE, f"{recipe}, seed {seed}\n")
    if not (output / "vae").exists():
        trained = train_vae(recipe.vae, recipe.train_vae, seed, output)
        save(source_from_module(trained, VAE), output, "diffusers", jnp.float32)
    vae = load_vae(output)
    quality = psnr(vae, draw_clips(Purpose.HELD_OUT, seed, recipe.held_out, KNOWN_LAWS, held_out=True)[0])
    print(f"autoencoder: {quality:.2f} dB on clips at held-out speeds", flush=True)
    if not model.exists():
        latents, captions = _base_clips(output, recipe, seed)
        _, others = draw_clips(Purpose.TOKENIZER, seed, NUM_CAPTIONS, KNOWN_LAWS)
        write_tokenizer(output / "tokenizer", [*captions, *others], recipe.text_encoder.vocab_size)
        transformer, text_encoder = train_base(
            latents, _tokenise(output, captions), (recipe.transformer, recipe.text_encoder), recipe.train_base, seed,
            output,
        )  # fmt: skip
        networks = (
            source_from_module(transformer, TRANSFORMER),
            find_source(output, VAE),
            source_from_module(text_encoder, TEXT_ENCODER),
        )
        save_model(list(networks), output / "tokenizer", model, "diffusers", jnp.bfloat16)
    print(evaluate_model(model, recipe.transformer, output, recipe.samples), flush=True)


def _check_recipe(file: Path, text: str) -> None:
    """Write down what the results depend on, and refuse the folder of another recipe or seed."""
    if not file.exists():
        with replacing(file) as scratch:
            scratch.write_text(text, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != text:
        raise InputError(f"{file.parent}: holds results of another recipe or seed; expected a new folder")


def _base_clips(output: Path, recipe: Recipe, seed: int) -> tuple[Float[np.ndarray, "n f h w c"], list[str]]:
    """Return the latents and captions of the clips for the transformer, from a file that is made if it is missing."""
    file = output / LATENTS_FILE
    if not file.exists():
        clips, captions = draw_clips(Purpose.BASE, seed, recipe.base_clips, BASE_LAWS)
        latents = encode_clips(load_vae(output), clips)
        with replacing(file) as scratch, open(scratch, "wb") as stream:
            np.savez(stream, latents=latents, captions=np.array(captions))
    with np.load(file) as arrays:
        return arrays["latents"], arrays["captions"].tolist()


def _tokenise(output: Path, captions: Sequence[str]) -> CaptionTokens:
    """Tokenise the captions and, as the last row, the empty caption; cut all rows to the longest caption."""
    ids, mask = Tokenizer(output)([*captions, ""])
    longest = int(mask.sum(1).max())
    return CaptionTokens(ids[:, :longest], mask[:, :longest])
