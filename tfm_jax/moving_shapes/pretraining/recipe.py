"""Trains the embedded model from random weights: clips -> autoencoder -> latents -> transformer and text encoder.

The resulting model ships as `tfm_jax/moving_shapes/wan_tiny`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from tfm_jax import video
from tfm_jax.data.metadata import read_metadata
from tfm_jax.errors import InputError
from tfm_jax.moving_shapes.pretraining.autoencoder import Clips, Phase, VaeRecipe, encode_clips, psnr, train_vae
from tfm_jax.moving_shapes.pretraining.base import BaseRecipe, CaptionTokens, train_base
from tfm_jax.moving_shapes.pretraining.quality import evaluate_model
from tfm_jax.moving_shapes.scene import LAWS, ClipSpec
from tfm_jax.moving_shapes.tokenizer import write_tokenizer
from tfm_jax.moving_shapes.world import has_clips, write_clips
from tfm_jax.wan import load_vae
from tfm_jax.wan.components import TEXT_ENCODER, TRANSFORMER, VAE
from tfm_jax.wan.saving import save, save_model
from tfm_jax.wan.sources import find_source, source_from_module
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.tokenizer import Tokenizer
from tfm_jax.wan.transformer import TransformerConfig
from tfm_jax.wan.vae import VaeConfig

BASE_LAWS = ("uniform", "uniform", "uniform", "still")
"""Laws that the transformer learns, drawn with equal probability, so that three quarters of the clips show motion. The
other laws are left to fine-tuning."""
NUM_OBJECTS = (1, 1, 1, 2)
"""Numbers of objects, drawn with equal probability unless the law fixes the number: a quarter of the clips have two."""


class Recipe(NamedTuple):
    """The sizes and training settings of the three networks, and the numbers of clips."""

    vae: VaeConfig = VaeConfig(base_dim=8)
    transformer: TransformerConfig = TransformerConfig(dim=128, ffn_dim=512, heads=4, layers=8, text_dim=64)
    text_encoder: TextEncoderConfig = TextEncoderConfig(
        vocab_size=256, dim=64, heads=4, head_dim=16, ffn_dim=128, layers=2
    )
    vae_clips: int = 1500
    """Number of clips for the autoencoder. They cover all laws of motion, also those of later fine-tuning."""
    base_clips: int = 4000
    """Number of clips for the transformer; their laws are BASE_LAWS."""
    held_out: int = 64
    """Number of clips on which the reconstruction is measured; their speeds occur in neither of the two sets above."""
    samples: int = 48
    """Number of captions for which the finished model samples videos."""
    train_vae: VaeRecipe = VaeRecipe((Phase(1000, 1, 32, 16), Phase(1400, 5, 32, 8), Phase(700, 17, 32, 4)))
    train_base: BaseRecipe = BaseRecipe(5000)

    def shortened(self, share: float) -> "Recipe":
        """Return the recipe with the fraction `share` of its clips and steps."""

        def part(number: int, minimum: int) -> int:
            return max(minimum, round(share * number))

        phases = tuple(phase._replace(steps=part(phase.steps, 2)) for phase in self.train_vae.phases)
        return self._replace(
            vae_clips=part(self.vae_clips, 4),
            base_clips=part(self.base_clips, 4),
            held_out=part(self.held_out, 2),
            samples=part(self.samples, 2),
            train_vae=self.train_vae._replace(phases=phases),
            train_base=self.train_base._replace(steps=part(self.train_base.steps, 2)),
        )


def pretrain(output: Path, recipe: Recipe, seed: int = 0) -> None:
    """Write clips, the logs of both stages, the model and samples into `output`, and print the model's quality.

    Stages whose results exist are skipped.

    Raises:
        InputError: all results exist already.
    """
    model = output / "model"
    if (output / "samples").exists():
        raise InputError(f"{output}: already complete; expected a new folder, or one in which some results are missing")
    output.mkdir(parents=True, exist_ok=True)
    _make_clips(output, recipe, seed)
    if not (output / "vae").exists():
        clips, _ = read_clips(output / "clips" / "all")
        vae = train_vae(clips, recipe.vae, recipe.train_vae, seed, output / "vae.jsonl")
        save(source_from_module(vae, VAE), output, "diffusers", jnp.float32)
    vae = load_vae(output)
    quality = psnr(vae, read_clips(output / "clips" / "held_out")[0])
    print(f"autoencoder: {quality:.2f} dB on clips at held-out speeds", flush=True)
    if not model.exists():
        clips, captions = read_clips(output / "clips" / "base")
        write_tokenizer(output / "tokenizer", _all_captions(output), recipe.text_encoder.vocab_size)
        transformer, text_encoder = train_base(
            encode_clips(vae, clips), _tokenise(output, captions), (recipe.transformer, recipe.text_encoder),
            recipe.train_base, seed, output / "base.jsonl",
        )  # fmt: skip
        networks = (
            source_from_module(transformer, TRANSFORMER),
            find_source(output, VAE),
            source_from_module(text_encoder, TEXT_ENCODER),
        )
        save_model(list(networks), output / "tokenizer", model, "diffusers", jnp.bfloat16)
    print(evaluate_model(model, recipe.transformer, BASE_LAWS, output, recipe.samples), flush=True)


def _make_clips(output: Path, recipe: Recipe, seed: int) -> None:
    folders = {
        "all": (recipe.vae_clips, tuple(LAWS), False),
        "base": (recipe.base_clips, BASE_LAWS, False),
        "held_out": (recipe.held_out, tuple(LAWS), True),
    }
    for number, (name, (count, laws, held_out)) in enumerate(folders.items()):
        folder = output / "clips" / name
        if not has_clips(folder):
            print(f"making {count} clips in {folder}", flush=True)
            write_clips(folder, count, seed=3 * seed + number, laws=laws, num_objects=NUM_OBJECTS, held_out=held_out)


def read_clips(folder: Path) -> tuple[Clips, list[str]]:
    """Return the pixels and the captions of all clips of a folder."""
    spec, rows = ClipSpec(), read_metadata(folder)
    pixels = [
        video.read_clip(row.path, spec.frames, *spec.size, spec.fps)
        for row in tqdm(rows, desc=f"reading {folder.name}", unit="clip")
    ]
    return np.stack(pixels), [row.prompt for row in rows]


def _all_captions(output: Path) -> list[str]:
    """Return captions of all laws, so that the tokenizer also knows the words for motions that fine-tuning teaches."""
    return [row.prompt for name in ("all", "base") for row in read_metadata(output / "clips" / name)]


def _tokenise(output: Path, captions: Sequence[str]) -> CaptionTokens:
    """Tokenise the captions and, as the last row, the empty caption; cut all rows to the longest caption."""
    ids, mask = Tokenizer(output)([*captions, ""])
    longest = int(mask.sum(1).max())
    return CaptionTokens(ids[:, :longest], mask[:, :longest])
