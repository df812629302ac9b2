"""Many clips of all kinds, good and bad, and the program that prepares them while a test kills it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from helpers.clips import display_matrix, encode, grey_clip, smooth_clip, write_sound
from PIL import Image

from tfm_jax.video import write_clip

BUCKETS = [[5, 32, 32], [1, 32, 32], [5, 32, 64]]
"""The widest videos have no size of one frame."""

PREPARING = """
import sys, time
from tfm_jax.cli.prepare import main
from tfm_jax.data import blocks
from tfm_jax.data.encoding import Encoders
blocks.MAX_ROWS = 4
encode = Encoders.latents

def slowly(encoders, clips):
    time.sleep(0.1)
    return encode(encoders, clips)

Encoders.latents = slowly
sys.argv[0] = "tfm-prepare"
main()
"""
"""tfm-prepare with small blocks, so slow that it can be killed between them."""


class Bad(NamedTuple):
    """A kind of file that cannot be used."""

    suffix: str
    write: Callable[[Path], object]
    reason: str
    """What rejected.jsonl says, in part."""


def _cut(path: Path, share: float) -> None:
    write_clip(path, smooth_clip(20), 16)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _unknown_codec(path: Path) -> None:
    encode(path, smooth_clip(9))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def _backwards(path: Path) -> None:
    """A Matroska block contains its time in milliseconds and one frame of this codec."""
    encode(path, grey_clip(8), container="matroska", codec="mjpeg", pix_fmt="yuvj420p")
    third = b"\x81" + (125).to_bytes(2, "big") + b"\x80\xff\xd8"
    path.write_bytes(path.read_bytes().replace(third, b"\x81" + (10).to_bytes(2, "big") + b"\x80\xff\xd8"))


def _image(path: Path, share: float = 1, alpha: int | None = None) -> None:
    picture = Image.fromarray(smooth_clip(1, 64, 64)[0])
    if alpha is not None:
        picture.putalpha(alpha)
    picture.save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _animation(path: Path) -> None:
    first, *others = map(Image.fromarray, smooth_clip(3, 64, 64))
    first.save(path, save_all=True, append_images=others)


BAD = {
    "missing": Bad(".mp4", lambda path: None, "no such file"),
    "folder": Bad(".mp4", lambda path: path.mkdir(), "no such file"),
    "loop": Bad(".mp4", lambda path: path.symlink_to(path.name), "no such file"),
    "long" + "g" * 300: Bad(".mp4", lambda path: None, "no such file"),
    "empty": Bad(".mp4", lambda path: path.write_bytes(b""), "is damaged or not a video"),
    "text": Bad(".mkv", lambda path: path.write_text("not a video"), "is damaged or not a video"),
    "html": Bad(".avi", lambda path: path.write_text("<!DOCTYPE html>"), "is damaged or not a video"),
    "playlist": Bad(".mov", lambda path: path.write_text("#EXTM3U\n/etc/passwd\n"), "is damaged or not a video"),
    "type": Bad(".gif", lambda path: path.write_bytes(b"GIF89a"), "unknown file type"),
    "header": Bad(".mp4", lambda path: _cut(path, 0.001), "is damaged or not a video"),
    "cut": Bad(".mp4", lambda path: _cut(path, 0.2), "expected"),
    "sound": Bad(".mp4", write_sound, "contains no video stream"),
    "short": Bad(".mp4", lambda path: encode(path, smooth_clip(3, 32, 64)), "expected enough for 5 frames"),
    "codec": Bad(".mp4", _unknown_codec, "there is no decoder"),
    "turned": Bad(
        ".mp4", lambda path: encode(path, smooth_clip(9), matrix=display_matrix(0.7, 0.7, -0.7, 0.7)), "display matrix"
    ),
    "flat": Bad(".mp4", lambda path: encode(path, smooth_clip(9), matrix=display_matrix(0, 0, 0, 1)), "display matrix"),
    "backwards": Bad(".mkv", _backwards, "frame 2 is shown before frame 1"),
    "picture": Bad(".png", lambda path: path.write_text("not an image"), "is not an image"),
    "half": Bad(".png", lambda path: _image(path, 0.5), "is damaged"),
    "glass": Bad(".png", lambda path: _image(path, alpha=128), "has transparent pixels"),
    "moving": Bad(".webp", _animation, "is animated"),
}
"""The kinds of bad files."""


def _write_good(folder: Path, number: int) -> str:
    """Write a clip with the size, length, rate, rotation and container that its number gives; return its name."""
    sizes = [(64, 64), (48, 80), (90, 62), (34, 50), (32, 64)]
    height, width = sizes[number % 5]
    if number % 6 == 5:
        name = f"{number}.{('png', 'jpg', 'webp')[number % 3]}"
        Image.fromarray(smooth_clip(1, 48, 64, number)[0]).save(folder / name)
        return name
    container, suffix = [("mp4", "mp4"), ("matroska", "mkv"), ("mov", "mov")][number % 3]
    name, frames = f"{number}.{suffix}", 10 + number % 7
    stamps = [frame / (24 if number % 2 else 12) for frame in range(frames)]
    clip = smooth_clip(frames, height, width, number)
    encode(folder / name, clip, container=container, stamps=stamps, rotation=[0, 90, 180, 270][number % 4])
    return name


class Many(NamedTuple):
    """A folder of many clips."""

    good: list[str]
    bad: dict[str, str]
    """Name -> what rejected.jsonl says, in part."""


def write_many(folder: Path, good: int, bad: int) -> Many:
    """Write a folder of clips and its list, in which the bad ones are spread between the good ones."""
    folder.mkdir()
    many = Many([_write_good(folder, number) for number in range(good)], {})
    names = list(many.good)
    for number in range(bad):
        kind, (suffix, write, reason) = list(BAD.items())[number % len(BAD)]
        name = f"{kind}{number}{suffix}"
        write(folder / name)
        many.bad[name] = reason
        names.insert(number * (good // bad + 1), name)
    rows = [{"video": name, "prompt": f"clip {number % 7}"} for number, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return many


def preparing(folder: Path, output: Path, *options: str) -> Sequence[str]:
    """Return the command line that prepares the clips of a folder with the embedded model."""
    clip = ["--clip.frames=5", "--clip.height=32", "--clip.width=32", f"--clip.buckets={BUCKETS}"]
    return ["--config", "wan_tiny", f"--data.source={folder}", f"--data.path={output}", *clip, *options]
