"""The scenes of the training, drawn from the world without writing video files."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from tfm_jax.moving_shapes.scene import Scene
from tfm_jax.moving_shapes.world import make_scene

KNOWN_LAWS = ("still", "uniform", "bouncing", "gravity", "orbit", "collision")
"""Laws that the autoencoder sees and whose words the tokenizer is built from, also those of later fine-tuning. A law
that was added to the world after the training of the shipped model is not among them."""
VAE_LAWS = (*KNOWN_LAWS, "gravity", "gravity")
"""Laws of the autoencoder's clips, drawn with equal probability. Gravity has the fastest motion and occurs three times
as often as the others."""
BASE_LAWS = (*["uniform"] * 7, "still")
"""Laws that the transformer learns, drawn with equal probability, so that seven clips of eight show motion. The other
laws are left to fine-tuning."""
NUM_OBJECTS = (*[1] * 7, 2)
"""Numbers of objects, drawn with equal probability unless the law fixes the number."""

Clips = UInt8[np.ndarray, "n t y x 3"]


class Purpose(IntEnum):
    """What a scene is for. Scenes for different purposes have different random numbers."""

    VAE = 1
    NORMALISATION = 2
    BASE = 3
    HELD_OUT = 4
    TOKENIZER = 5


def draw_scene(purpose: Purpose, seed: int, *numbers: int, laws: Sequence[str], held_out: bool = False) -> Scene:
    """Draw the scene that the seed and the numbers determine."""
    # The purpose comes last because NumPy's generator ignores zeros at the end of a seed.
    rng = np.random.default_rng((seed, *numbers, purpose))
    return make_scene(rng, laws=laws, num_objects=NUM_OBJECTS, held_out=held_out)


def draw_clips(
    purpose: Purpose, seed: int, count: int, laws: Sequence[str], held_out: bool = False
) -> tuple[Clips, list[str]]:
    """Return the pixels and the captions of `count` scenes."""
    numbers = tqdm(range(count), desc=f"drawing scenes ({purpose.name.lower()})", unit="scene")
    scenes = [draw_scene(purpose, seed, number, laws=laws, held_out=held_out) for number in numbers]
    return np.stack([scene.pixels for scene in scenes]), [scene.caption for scene in scenes]
