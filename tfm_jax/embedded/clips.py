"""Clips made on the spot: one shape of one colour that moves evenly over a dark ground, with a caption that says so."""

import csv
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from tfm_jax import video

SHAPES = ("disc", "square", "triangle")
COLOURS = {"red": (226, 61, 52), "green": (62, 178, 84), "blue": (66, 112, 232), "yellow": (240, 200, 48)}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.25, "fast": 0.65}
"""A second, in heights or widths of the picture, whichever is less."""
RADIUS = 0.16
"""Half the size of a shape, in the same unit."""
GROUND = (24, 26, 32)
OVERSAMPLING = 4


def write_clips(
    folder: Path, count: int, frames: int = 17, size: tuple[int, int] = (64, 64), fps: float | int = 16, seed: int = 0
) -> None:
    """Write `count` mp4 files and metadata.csv (columns video, prompt) into `folder`.

    Clip n is a function of (seed, n), frames, size (height, width) and fps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        clip, caption = make_clip(np.random.default_rng((seed, number)), frames, size, fps)
        name = f"{number:04d}.mp4"
        video.write_clip(folder / name, clip, fps)
        rows.append((name, caption))
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("video", "prompt"), *rows])


def make_clip(
    rng: np.random.Generator, frames: int, size: tuple[int, int], fps: float | int
) -> tuple[UInt8[np.ndarray, "t y x 3"], str]:
    """A clip drawn at random, and its caption."""
    shape, colour, direction, speed = (str(rng.choice(list(names))) for names in (SHAPES, COLOURS, DIRECTIONS, SPEEDS))
    height, width = size
    radius = RADIUS * min(size)
    room = np.array([width, height]) - 2 * radius
    velocity = np.array(DIRECTIONS[direction]) * SPEEDS[speed] * min(size) / fps
    # Where the clip is short enough, the start leaves room to move all along in the direction of the caption.
    start = rng.uniform(size=2) * np.maximum(0, room - np.abs(velocity) * (frames - 1))
    start = np.where(velocity < 0, room - start, start)
    centres = radius + bounce(start + velocity * np.arange(frames)[:, None], room)
    clip = np.stack([draw(shape, COLOURS[colour], centre, radius, size) for centre in centres])
    return clip, f"a {colour} {shape} moves {direction}, {speed}, on a dark ground"


def bounce(position: Float[np.ndarray, "t 2"], room: Float[np.ndarray, "2"]) -> Float[np.ndarray, "t 2"]:
    """Fold free motion into 0..room, as a ball between two walls."""
    return room - np.abs(position % (2 * room) - room)


def draw(
    shape: str, colour: tuple[int, int, int], centre: Float[np.ndarray, "2"], radius: float, size: tuple[int, int]
) -> UInt8[np.ndarray, "y x 3"]:
    """One frame, antialiased: drawn larger and averaged down."""
    height, width = size
    image = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), GROUND)
    canvas = ImageDraw.Draw(image)
    (x, y), r = centre * OVERSAMPLING, radius * OVERSAMPLING
    box = (x - r, y - r, x + r, y + r)
    if shape == "disc":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    else:
        canvas.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    return np.asarray(image.reduce(OVERSAMPLING))
