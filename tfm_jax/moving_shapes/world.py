"""Makes scenes of moving shapes, and folders of clips with captions and exact positions.

In each scene, one or two shapes of different colours obey a law of motion in front of a dark background. Scene n
depends only on the seed, n and its arguments.
"""

import csv
import itertools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfm_jax import video
from tfm_jax.moving_shapes.captions import write_caption
from tfm_jax.moving_shapes.motion import draw_motions
from tfm_jax.moving_shapes.rendering import render
from tfm_jax.moving_shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    FIXED_COUNTS,
    HELD_OUT_SPEEDS,
    LAWS,
    SHAPES,
    SPEEDS,
    ClipSpec,
    Scene,
    SceneObject,
)  # fmt: skip

STATES_FILE = "states.json"


def write_clips(
    folder: Path,
    count: int,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    fps: float | int = 16,
    seed: int = 0,
    laws: Sequence[str] = tuple(LAWS),
    num_objects: Sequence[int] = (1, 2),
    held_out: bool = False,
    without: Collection[str] = (),
) -> None:
    """Write `count` mp4 files, metadata.csv (columns video, prompt) and, last, states.json into `folder`.

    states.json maps each file name to the law, the background and the objects of its scene. See `make_scene` for the
    other arguments.

    Args:
        without: captions whose scenes are left out; the next scenes replace them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, states = [], []
    rngs = (np.random.default_rng((seed, number)) for number in itertools.count())
    scenes = (make_scene(rng, frames, size, fps, laws, num_objects, held_out) for rng in rngs)
    wanted = (scene for scene in scenes if scene.caption not in without)
    for number, scene in enumerate(itertools.islice(wanted, count)):
        name = f"{number:04d}.mp4"
        video.write_clip(folder / name, scene.pixels, fps)
        rows.append((name, scene.caption))
        states.append(f"{json.dumps(name)}: {json.dumps(_state(scene))}")
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("video", "prompt"), *rows])
    (folder / STATES_FILE).write_text("{\n" + ",\n".join(states) + "\n}\n", encoding="utf-8")


def has_clips(folder: Path) -> bool:
    """Whether `write_clips` has completed in this folder."""
    return (folder / STATES_FILE).exists()


def _state(scene: Scene) -> dict[str, Any]:
    objects = [
        {**obj._asdict(), "speed": round(speed, 4), "positions": positions.round(3).tolist()}
        for obj, speed, positions in zip(scene.objects, scene.speeds, scene.positions, strict=True)
    ]
    return {"law": scene.law, "background": scene.background, "objects": objects}


def make_scene(
    rng: np.random.Generator,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    fps: float | int = 16,
    laws: Sequence[str] = tuple(LAWS),
    num_objects: Sequence[int] = (1, 2),
    held_out: bool = False,
) -> Scene:
    """Draw a scene at random.

    Args:
        size: height and width in pixels.
        laws: keys of LAWS; one of them is drawn.
        num_objects: possible numbers of objects; one of them is drawn, unless FIXED_COUNTS sets the number.
        held_out: draw speeds from HELD_OUT_SPEEDS instead of SPEEDS.

    Raises:
        InputError: the clip is so long that the motion does not fit into the picture.
    """
    spec = ClipSpec(frames, size, fps)
    law = str(rng.choice(list(laws)))
    count = FIXED_COUNTS.get(law) or int(rng.choice(list(num_objects)))
    colours = [str(colour) for colour in rng.choice(list(COLOURS), size=count, replace=False)]
    shapes = ["disc" if law == "collision" else str(shape) for shape in rng.choice(SHAPES, size=count)]
    background = str(rng.choice(list(BACKGROUNDS)))
    motions, paths = draw_motions(rng, law, count, spec, HELD_OUT_SPEEDS if held_out else SPEEDS)
    objects = tuple(
        SceneObject(colour, shape, motion.direction, motion.pace)
        for colour, shape, motion in zip(colours, shapes, motions, strict=True)
    )
    positions = paths + spec.radius
    pixels = render(objects, positions, background, spec)
    caption = write_caption(law, objects, background)
    speeds = tuple(motion.speed for motion in motions)
    return Scene(pixels, caption, law, background, objects, speeds, positions)
