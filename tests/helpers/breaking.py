"""Ways to break the inputs of a tiny world. Most functions return a `Break`, which changes copies in a folder."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from tfm_jax import video


class Place(NamedTuple):
    """The folders for one row of the table of bad input."""

    world: Path
    """A valid world, shared by all rows."""
    tmp: Path
    """A scratch folder for this row only."""

    def copy(self, name: str) -> Path:
        """Copy the first part of `name` (`model` of `model/vae`) from the world, and return the path of the copy.

        The copied files are hard links to those of the world. Do not write to them; use `fresh` instead.
        """
        top = Path(name).parts[0]
        if (self.world / top).is_dir() and not (self.tmp / top).exists():
            shutil.copytree(self.world / top, self.tmp / top, copy_function=os.link)
        elif (self.world / top).is_file() and not (self.tmp / top).exists():
            os.link(self.world / top, self.tmp / top)
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def fresh(self, name: str) -> Path:
        """Like `copy`, but remove the link, so that the file can be written."""
        path = self.copy(name)
        path.unlink(missing_ok=True)
        return path


Break = Callable[[Place], None]

GONE = object()
"""As a value for `edit_json`, this removes the key."""

DEEP = "[" * 100_000 + "]" * 100_000
HTML = "<!DOCTYPE html><html><body>Access denied</body></html>"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b\nsize 132\n"


# --- Any file --------------------------------------------------------------------------------------------------------


def copied(name: str) -> Break:
    """Make an unchanged copy."""
    return lambda place: void(place.copy(name))


def void(_: object) -> None:
    """Take a value and do nothing."""


def write(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda place: void(place.fresh(name).write_bytes(data))


def edit(name: str, change: Callable[[bytes], bytes]) -> Break:
    def apply(place: Place) -> None:
        data = change(place.copy(name).read_bytes())
        place.fresh(name).write_bytes(data)

    return apply


def edit_json(name: str, **changes: Any) -> Break:
    def change(data: bytes) -> bytes:
        values = json.loads(data) | changes
        return json.dumps({key: value for key, value in values.items() if value is not GONE}).encode()

    return edit(name, change)


def replace(name: str, old: str, new: str) -> Break:
    """Replace a text that must occur in the file."""

    def change(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode())

    return edit(name, change)


def cut(name: str, share: float = 0.6) -> Break:
    return edit(name, lambda data: data[: int(share * len(data))])


def flip(name: str, share: float = 0.9) -> Break:
    """Flip one bit of the byte at the fraction `share` of the file."""

    def change(data: bytes) -> bytes:
        position = int(share * len(data))
        return data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :]

    return edit(name, change)


def remove(name: str) -> Break:
    def apply(place: Place) -> None:
        path = place.copy(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def folder(name: str) -> Break:
    return lambda place: place.copy(name).mkdir(parents=True)


def rename(name: str, new: str) -> Break:
    return lambda place: void(place.copy(name).rename(place.tmp / new))


def link(name: str, target: str) -> Break:
    """Make a symbolic link; `target` may name a file of the world as `$world/...`."""

    def apply(place: Place) -> None:
        place.fresh(name).symlink_to(target.replace("$world", str(place.world)))

    return apply


def each(pattern: str, change: Callable[[str], Break]) -> Break:
    """Apply the same break to every path of the world that matches a pattern."""

    def apply(place: Place) -> None:
        names = [str(path.relative_to(place.world)) for path in sorted(place.world.glob(pattern))]
        assert names, pattern
        for name in names:
            change(name)(place)

    return apply


# --- Tensors ---------------------------------------------------------------------------------------------------------


def edit_tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Break:
    """Apply `change` to the dictionary of tensors of a safetensors file."""

    def apply(place: Place) -> None:
        tensors = load_file(place.copy(name))
        change(tensors)
        save_file(tensors, place.fresh(name))

    return apply


def poison(tensor: str, value: float = np.nan) -> Callable[[dict[str, np.ndarray]], None]:
    """Return a change for `edit_tensors` that sets the last number of a tensor to `value`."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        array = tensors[tensor].copy()
        array.reshape(-1)[-1] = value
        tensors[tensor] = array

    return change


def safetensors(header: Mapping[str, Any] | str, data: bytes = b"") -> bytes:
    """Return the content of a safetensors file with this header, which may be invalid."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


REPEATED_KEY = safetensors(
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    bytes(4),
)


def lora(name: str, change: Callable[[dict[str, np.ndarray]], object] = void, **metadata: str) -> Break:
    """Write a LoRA file for the model of the world; `change` edits its tensors, which are valid before."""

    def apply(place: Place) -> None:
        rng = np.random.default_rng(0)
        tensors = {}
        for layer in range(4):
            module = f"diffusion_model.blocks.{layer}.self_attn.q"
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((2, 96), np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((96, 2), np.float32)
        change(tensors)
        save_file(tensors, place.fresh(name), metadata)

    return apply


# --- PyTorch checkpoints ---------------------------------------------------------------------------------------------


def pth(name: str, state: Callable[[], Any]) -> Break:
    return lambda place: torch.save(state(), place.fresh(name))


def overlapping() -> dict[str, torch.Tensor]:
    """Return two tensors that share half of their storage."""
    numbers = torch.arange(6.0)
    return {"a": numbers[:4], "b": numbers[2:]}


def deflated(name: str) -> Break:
    """Write a checkpoint with compressed entries, which a memory map would read as numbers."""

    def apply(place: Place) -> None:
        file = place.fresh(name)
        torch.save({"a": torch.ones(64)}, file)
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, data in entries.items():
                archive.writestr(entry, data)

    return apply


def evil(name: str) -> Break:
    """Write a checkpoint that creates a folder when it is unpickled without restrictions."""

    class Evil:
        def __init__(self, path: Path):
            self.path = path

        def __reduce__(self) -> tuple:
            return os.mkdir, (str(self.path),)

    return lambda place: void(place.fresh(name).write_bytes(pickle.dumps({"a": Evil(place.tmp / "owned")})))


# --- Clips -----------------------------------------------------------------------------------------------------------


def metadata(content: str | bytes) -> Break:
    return write("clips/metadata.csv", content)


def clip(name: str, frames: int = 5, size: tuple[int, int] = (32, 48)) -> Break:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (frames, *size, 3), np.uint8)
    return lambda place: video.write_clip(place.fresh(name), pixels, 16)


def png(colour: tuple[int, ...]) -> bytes:
    """Return an image of 32 x 48 pixels."""
    file = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", (48, 32), colour).save(file, "PNG")
    return file.getvalue()


PNG = png((255, 0, 0))


def sound_only(name: str) -> Break:
    """Write an mp4 file with a tenth of a second of silence and no video stream."""

    def apply(place: Place) -> None:
        with av.open(place.fresh(name), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=48000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))

    return apply


def matrix(name: str, *values: int) -> Break:
    """Set the first four numbers of the display matrix of an upright clip."""
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = values
    other = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    def change(data: bytes) -> bytes:
        start = data.index(upright, data.index(b"tkhd"))  # change the matrix of the track, not that of the movie
        return data[:start] + other + data[start + len(other) :]

    return edit(name, change)
