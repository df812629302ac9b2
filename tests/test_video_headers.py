"""What headers say about videos and images, compared with what reading them gives."""

import struct
from fractions import Fraction

import pytest
from helpers.clips import FPS, display_matrix, encode, grey_clip, smooth_clip, which
from PIL import Image

from tfm_jax.errors import InputError
from tfm_jax.video import read_windows
from tfm_jax.video_headers import Header, read_header

CONTAINERS = [
    ("mp4", "mp4", "libx264"), ("mov", "mov", "libx264"), ("mkv", "matroska", "libx264"), ("webm", "webm", "libvpx"),
    ("avi", "avi", "mpeg4"), ("avi", "avi", "libx264"), ("flv", "flv", "flv"), ("wmv", "asf", "wmv2"),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "container", "codec"), CONTAINERS)
@pytest.mark.parametrize("frames", [6, 17])
def test_the_header_promises_what_can_be_read(tmp_path, suffix, container, codec, frames):
    """At every rate, the promised number of frames can be read, and not one more."""
    path = encode(tmp_path / f"a.{suffix}", grey_clip(frames), container=container, codec=codec)
    header = read_header(path)
    assert (header.frames, header.height, header.width) == (frames, 64, 64)
    for fps in ("native", FPS, 8, 24, 7.3):
        count = header.frames_at(fps)
        [clip] = read_windows(path, [0], count, 64, 64, fps)
        assert len(clip) == count
        with pytest.raises(InputError, match="expected"):
            list(read_windows(path, [0], count + 1, 64, 64, fps))


def test_rate_and_length(tmp_path):
    assert read_header(encode(tmp_path / "b.mp4", grey_clip(1))).frames == 1
    assert read_header(encode(tmp_path / "a.mp4", grey_clip(20))) == Header(20, Fraction(16), Fraction(20, 16), 64, 64)


def test_an_edit_list_that_hides_frames(tmp_path):
    """A trimmed video may still contain what was cut off."""
    path = encode(tmp_path / "a.mp4", grey_clip(40))
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12  # of the only entry: its duration in milliseconds, and where it starts
    start = int.from_bytes(content[place + 4 : place + 8])
    content[place : place + 8] = struct.pack(">II", 1000, start + 8 * 1024)
    path.write_bytes(content)
    header = read_header(path)
    assert (header.frames, header.frames_at(FPS)) == (16, 16)
    [clip] = read_windows(path, [0], 16, 64, 64, "native")
    assert which(clip) == list(range(8, 24))


@pytest.mark.parametrize(("suffix", "container", "codec"), [("webm", "webm", "libvpx"), ("mkv", "matroska", "libx264")])
def test_a_recording_whose_header_has_no_length(tmp_path, suffix, container, codec):
    """Browsers write such files."""
    path = encode(tmp_path / f"a.{suffix}", grey_clip(40), container=container, codec=codec, options={"live": "1"})
    header = read_header(path)
    assert (header.frames, header.frames_at(FPS)) == (40, 40)


def test_a_clip_that_starts_late(tmp_path):
    path = encode(tmp_path / "a.mkv", grey_clip(5), stamps=[2 + i / 16 for i in range(5)], container="matroska")
    header = read_header(path)
    assert (header.frames, header.frames_at(FPS)) == (5, 5)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
def test_the_size_is_that_of_the_upright_picture(tmp_path, suffix, rotation):
    container = {"mp4": "mp4", "mkv": "matroska"}[suffix]
    path = encode(tmp_path / f"a.{suffix}", smooth_clip(2), rotation=rotation, container=container)
    assert read_header(path)[3:] == ((96, 64) if rotation % 180 else (64, 96))


def test_a_mirrored_and_turned_picture(tmp_path):
    assert read_header(encode(tmp_path / "a.mp4", smooth_clip(2), matrix=display_matrix(0, 1, 1, 0)))[3:] == (96, 64)


def test_a_file_with_large_boxes(tmp_path):
    """The size of a box may be a number of 64 bits, and a version 1 header has longer times."""
    path = encode(tmp_path / "a.mp4", smooth_clip(2), rotation=90)
    content = path.read_bytes()
    place = content.index(b"mdat") - 4
    size = int.from_bytes(content[place : place + 4])
    large = (1).to_bytes(4) + b"mdat" + (size + 8).to_bytes(8)
    path.write_bytes(content[:place] + large + content[place + 8 :])
    assert read_header(path)[3:] == (96, 64)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_pixels_that_are_not_square(tmp_path, suffix):
    container = {"mp4": "mp4", "mkv": "matroska", "avi": "avi"}[suffix]
    path = encode(tmp_path / f"a.{suffix}", smooth_clip(2), container=container, aspect=Fraction(2))
    assert read_header(path)[3:] == (64, 192)


def test_images(tmp_path):
    picture = Image.fromarray(smooth_clip(1)[0])
    picture.save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png") == Header(1, None, Fraction(0), 64, 96)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=turned)
    assert read_header(tmp_path / "a.jpg")[3:] == (96, 64)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(InputError, match=r"b.png: is not an image"):
        read_header(tmp_path / "b.png")


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(InputError, match=r"none.mp4: no such file"):
        read_header(tmp_path / "none.mp4")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"a.txt: unknown file type"):
        read_header(tmp_path / "a.txt")
