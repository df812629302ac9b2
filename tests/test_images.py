"""Image files as clips of one frame: the pixels, and the files that are refused."""

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.clips import FPS, psnr, smooth_clip
from PIL import Image

from tfm_jax import images, video
from tfm_jax.errors import InputError
from tfm_jax.video import read_clip

PIXELS = smooth_clip(1)[0]
PICTURE = Image.fromarray(PIXELS)
GREY = np.asarray(PICTURE.convert("L"))


SIZES = [(48, 80), (64, 96), (100, 40), (31, 33), (130, 200)]


def read(path: Path) -> np.ndarray:
    [frame] = read_clip(path, 1, 64, 96, FPS)
    return frame


def refused(path: Path, match: str, frames: int = 1) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_clip(path, frames, 64, 96, FPS)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def png(kind: int, depth: int, values: np.ndarray, *more: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of any depth and colour type, with more chunks; Pillow cannot write all of them."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2" if depth == 16 else np.uint8).tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --- Pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.JPEG", "a PNG file.jpg"])
def test_formats(tmp_path, name):
    """The content decides about the format, not the suffix."""
    lossless = "jp" not in name.lower() or "PNG" in name
    kind = {"format": "PNG"} if "PNG" in name else {"lossless": True} if lossless else {"quality": 95}
    PICTURE.save(tmp_path / name, **kind)
    frame = read(tmp_path / name)
    assert frame.dtype == np.uint8
    assert np.array_equal(frame, PIXELS) if lossless else psnr(frame, PIXELS) > 35


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    """The first stored row is displayed at the top, or where the table of the EXIF standard says."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {
        1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1), 6: np.rot90(PIXELS), 7: np.rot90(PIXELS, 2).swapaxes(0, 1), 8: np.rot90(PIXELS, -1),
    }[orientation]  # fmt: skip
    more = {"quality": 95} if suffix == "jpg" else {"lossless": True}
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{suffix}", exif=exif, **more)
    assert np.abs(read(tmp_path / f"a.{suffix}").astype(int) - PIXELS).mean() < 3


def test_scaling_and_crop(tmp_path):
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, 80:176] = PIXELS
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), PIXELS)
    PICTURE.resize((192, 128), Image.Resampling.BICUBIC).save(tmp_path / "b.png")
    assert psnr(read(tmp_path / "b.png"), PIXELS) > 30


COLOURS = np.arange(64 * 96, dtype=np.uint8).reshape(64, 96)
PALETTE = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
OPAQUE = np.full((64, 96), 255, np.uint8)

DEPTHS = {
    "palette": (png(3, 8, COLOURS, (b"PLTE", PALETTE.tobytes())), PALETTE[COLOURS]),
    "opaque palette": (
        png(3, 8, COLOURS, (b"PLTE", PALETTE.tobytes()), (b"tRNS", bytes([255] * 256))),
        PALETTE[COLOURS],
    ),
    "opaque alpha": (png(6, 8, np.dstack([PIXELS, OPAQUE])), PIXELS),
    "8-bit grey": (png(0, 8, GREY), GREY[..., None].repeat(3, 2)),
    "16-bit colour": (png(2, 16, 257 * PIXELS.astype(np.uint16)), PIXELS),
    "16-bit grey": (png(0, 16, 257 * GREY.astype(np.uint16)), GREY[..., None].repeat(3, 2)),
    "16-bit grey, an unused transparent value": (
        png(0, 16, 257 * GREY.astype(np.uint16), (b"tRNS", struct.pack(">H", 1))),
        GREY[..., None].repeat(3, 2),
    ),
    "16-bit colour, opaque alpha": (png(6, 16, 257 * np.dstack([PIXELS, OPAQUE]).astype(np.uint16)), PIXELS),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depths_and_palettes(tmp_path, name):
    content, expected = DEPTHS[name]
    (tmp_path / "a.png").write_bytes(content)
    assert np.array_equal(read(tmp_path / "a.png"), expected)


def test_jpeg_in_grey_and_for_print(tmp_path):
    for mode in ("L", "CMYK"):
        PICTURE.convert(mode).save(tmp_path / "a.jpg", quality=95)
        assert psnr(read(tmp_path / "a.jpg"), np.asarray(PICTURE.convert(mode).convert("RGB"))) > 35


def test_a_photo_with_a_preview(tmp_path):
    PICTURE.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[PICTURE], quality=95)
    assert psnr(read(tmp_path / "a.jpg"), PIXELS) > 35


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_more_frames_than_one(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "is an image, which has one frame; expected 81", frames=81)


@pytest.mark.parametrize(
    "content",
    [
        png(6, 8, np.dstack([PIXELS, OPAQUE - 1])),
        png(3, 8, COLOURS, (b"PLTE", PALETTE.tobytes()), (b"tRNS", bytes([255, 0]))),
        png(0, 16, 257 * GREY.astype(np.uint16), (b"tRNS", struct.pack(">H", 257 * int(GREY[3, 3])))),
        png(2, 8, PIXELS, (b"tRNS", struct.pack(">HHH", *PIXELS[3, 3]))),
    ],
    ids=["alpha", "palette", "a value of 16-bit grey", "a colour"],
)
def test_transparent_pixels(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "has transparent pixels; expected an opaque picture")


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_animated(tmp_path, suffix):
    PICTURE.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[PICTURE.rotate(180)])
    refused(tmp_path / f"a.{suffix}", "is animated; expected a still picture, or a video file")


def test_no_image(tmp_path):
    refused(tmp_path / "none.png", "no such file")
    for content in (b"", b"text", b"<html>", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "a.png").write_bytes(content)
        refused(tmp_path / "a.png", "is (damaged|not an image)")
    PICTURE.save(tmp_path / "a.png", format="GIF")  # of the dozens of formats of Pillow, three are enough
    refused(tmp_path / "a.png", "is not an image; expected a JPEG, PNG or WebP file")


@pytest.mark.parametrize("side", [7_000, 10_000, 20_000])
def test_absurd_sizes_are_refused_before_decoding(tmp_path, side):
    content = bytearray(png(2, 8, PIXELS))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "pixels; expected at most 35,389,440 pixels")


def test_the_limit_is_that_of_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 64 * 96 - 1)
    PICTURE.save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "has 96 x 64 pixels; expected at most 6,143 pixels")


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    PICTURE.save(path)
    content = path.read_bytes()
    for length in range(0, len(content) - 40, 29):
        path.write_bytes(content[:length])
        refused(path, "is (damaged|not an image)")


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged(tmp_path, suffix):
    """PNG has checksums. In the other formats most damage is not noticed, but nothing else may go wrong."""
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    PICTURE.save(path, exif=Image.Exif())
    content, noticed = path.read_bytes(), []
    for _ in range(100):
        data = bytearray(content)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            assert read(path).shape == (64, 96, 3)
        except InputError as error:
            noticed.append(str(error))
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in noticed)
    assert suffix != "png" or len(noticed) > 95


# --- Scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (90, 61), (135, 240)])
def test_bilinear_gives_the_pixels_of_the_official_code(rows, columns, height, width):
    """There, the whole picture is scaled to a rounded size by torchvision, which uses Pillow for pictures of Pillow,
    and its middle is cut out. torch's antialiased interpolation differs in rounding only."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8))
    found = images.scale_and_crop(picture, height, width, Fraction(1), "bilinear").astype(int)
    scale = max(width / columns, height / rows)
    size = round(rows * scale), round(columns * scale)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    whole = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    smooth = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert abs(found - smooth[top : top + height, left : left + width]).max() <= 1.5


def test_bilinear_without_antialiasing_would_differ():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (135, 240, 3), np.uint8))
    found = images.scale_and_crop(picture, 27, 48, Fraction(1), "bilinear").astype(int)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    sharp = torch.nn.functional.interpolate(pixels, (27, 48), mode="bilinear")[0].permute(1, 2, 0).numpy()
    assert abs(found - sharp).max() > 50


def test_a_long_strip_is_not_scaled_as_a_whole(monkeypatch):
    """Scaled to the height of the clip, it would have 32,000 columns."""
    strip = np.zeros((3, 2000, 3), np.uint8)
    strip[:, 990:1010] = 200
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda *args: (sizes.append(args[1]), resize(*args))[1])
    assert (images.scale_and_crop(Image.fromarray(strip), 48, 80, Fraction(1), "bilinear") == 200).all()
    assert sizes == [(images.LONGEST * 80, 48)]
