"""Writes the demo's animation: the clips of a few prompts side by side, as a GIF and as an mp4 file."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tfm_jax import video
from tfm_jax.moving_shapes.demo.examples import Example, ShownClip

CELL = 184
"""Width of a clip, as it is shown, in pixels."""
GAP = 6
LABELS = 54
"""Width of the column with the names of the sources."""
CAPTIONS = 56
"""Height of the row with the captions."""
FOOTER = 24
SPEED = 0.5
"""Speed of the animation, as a fraction of the speed of the clips."""
HOLD = 0.5
"""Minimum time, in seconds, for which the last frame is shown before the animation starts again."""
COLOURS = 64
"""Size of the palette of the GIF."""
NOTE = f"The real clips have the same captions but start elsewhere. Shown at {SPEED:g} times the real speed."


def write_animation(stem: Path, examples: Sequence[Example], fps: float | int) -> None:
    """Write the files `stem`.gif and `stem`.mp4, in which all clips start together."""
    frames = draw_frames(examples)
    rate = fps * SPEED
    extra = round(HOLD * rate)
    held = [*frames, *frames[-1:] * extra]
    video.write_clip(stem.with_suffix(".mp4"), np.stack([np.asarray(frame) for frame in held]), rate)
    durations = [round(1000 / rate)] * (len(frames) - 1) + [round(1000 * (1 + extra) / rate)]
    write_gif(stem.with_suffix(".gif"), frames, durations)


def write_gif(file: Path, frames: Sequence[Image.Image], durations: Sequence[int]) -> None:
    """Write an endless GIF, in which every frame has its duration in milliseconds, with one palette for all frames."""
    # The palette is that of means over blocks, so that it has no entries for the noise of the grounds. Median cut would
    # leave few entries for the shapes; k-means moves each entry to the centre of its colours.
    blocks = Image.fromarray(np.concatenate([np.asarray(frame.reduce(8)) for frame in frames]))
    palette = blocks.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    # Dithering would add noise that changes from frame to frame, which GIF compresses badly.
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(file, save_all=True, append_images=others, duration=list(durations), loop=0, optimize=True)


def draw_frames(examples: Sequence[Example]) -> list[Image.Image]:
    """Return the frames: a column for every example, a row for every source, labels and a note."""
    cells = [[_enlarge(clip) for clip in example.clips.values()] for example in examples]
    height = cells[0][0][0].height
    rows = len(examples[0].clips)
    bottom = CAPTIONS + rows * (height + GAP)
    width = LABELS + len(examples) * (CELL + GAP)
    canvas = Image.new("RGB", (width + width % 2, bottom + FOOTER + (bottom + FOOTER) % 2), "white")
    _write_texts(canvas, examples, height, bottom)
    frames = []
    for moment in range(len(cells[0][0])):
        frame = canvas.copy()
        for column, clips in enumerate(cells):
            for row, clip in enumerate(clips):
                frame.paste(clip[moment], (LABELS + column * (CELL + GAP), CAPTIONS + row * (height + GAP)))
        frames.append(frame)
    return frames


def _write_texts(canvas: Image.Image, examples: Sequence[Example], height: int, bottom: int) -> None:
    draw = ImageDraw.Draw(canvas)
    small, large = ImageFont.load_default(12), ImageFont.load_default(18)
    for column, example in enumerate(examples):
        middle = (LABELS + column * (CELL + GAP) + CELL / 2, CAPTIONS / 2)
        draw.multiline_text(middle, fill(example.caption, 32), "black", small, anchor="mm", align="center")
    for row, source in enumerate(examples[0].clips):
        middle = CAPTIONS + row * (height + GAP) + height / 2
        draw.text((LABELS / 2, middle), source, "black", large, anchor="mm")
    draw.text((LABELS, bottom + FOOTER / 2), NOTE, "black", small, anchor="lm")


def _enlarge(clip: ShownClip) -> list[Image.Image]:
    """Return the frames at the width CELL, with the centres of the objects up to each frame."""
    scale = CELL / clip.pixels.shape[2]
    size = (CELL, round(clip.pixels.shape[1] * scale))
    images = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in clip.pixels]
    for moment, image in enumerate(images):
        draw = ImageDraw.Draw(image)
        for x, y in clip.paths[:, : moment + 1].reshape(-1, 2) * scale:
            if np.isfinite(x):
                draw.circle((x, y), 2.5, fill="white", outline="black")
    return images
