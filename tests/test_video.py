"""Video files in and out: the pixels, the choice of frames, and what is refused."""

import hashlib
import os
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tfm_jax import video
from tfm_jax.errors import InputError
from tfm_jax.video import contact_sheet, from_uint8, read_clip, to_uint8, write_clip

FPS = 16


def smooth_clip(frames: int = 17, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Coloured blobs that drift: what video codecs are made for, with every region different from the others."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    canvas = np.asarray(Image.fromarray(pixels).resize((width + frames, height + frames), Image.Resampling.BICUBIC))
    return np.stack([canvas[i : i + height, i : i + width] for i in range(frames)])


def grey_clip(frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frame i is all of the value 10 + 5 i, so that a frame says which one it is."""
    values = np.arange(10, 10 + 5 * frames, 5, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (frames, height, width, 3))


def which(clip: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 10) / 5) for frame in clip]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def encode(
    path: Path,
    clip: np.ndarray,
    *,
    stamps: list[float] | None = None,
    rotation: int = 0,
    matrix: list[int] | None = None,
    codec: str = "libx264",
    container: str = "mp4",
    pix_fmt: str = "yuv420p",
    aspect: Fraction | None = None,
) -> Path:
    """A file with the odd properties that `write_clip` never gives one; `stamps` in seconds."""
    with av.open(path, "w", format=container) as output:
        stream = output.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix:
            stream.set_display_matrix(matrix)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if stamps:
                frame.pts, frame.time_base = round(1000 * stamps[number]), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def test_mp4_round_trip(tmp_path):
    clip = smooth_clip()
    write_clip(tmp_path / "a b.mp4", clip, FPS)
    again = read_clip(tmp_path / "a b.mp4", 17, 64, 96, FPS)
    assert again.shape == clip.shape
    assert again.dtype == np.uint8
    assert psnr(again, clip) > 35
    assert abs(float((again.astype(float) - clip).mean())) < 1
    assert [file.name for file in tmp_path.iterdir()] == ["a b.mp4"]


def test_pure_colours_survive(tmp_path):
    """A matrix or range that differs between writing and reading shifts colours by 10 and more."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 60, 90]], np.uint8)
    clip = np.broadcast_to(colours[:, None, None], (6, 32, 32, 3))
    write_clip(tmp_path / "a.mp4", clip, FPS)
    assert np.abs(read_clip(tmp_path / "a.mp4", 6, 32, 32, FPS).astype(int) - clip).max() <= 5


def test_write_replaces_and_leaves_nothing_behind_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_clip(path, smooth_clip(), FPS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_clip(path, smooth_clip(), FPS)
    assert len(read_clip(path, 17, 64, 96, FPS)) == 17


def test_a_path_that_looks_like_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("concat:folder")
    folder.mkdir()
    write_clip(folder / "file:a.mp4", smooth_clip(), FPS)
    assert len(read_clip(folder / "file:a.mp4", 17, 64, 96, FPS)) == 17


def test_odd_sizes_are_not_written(tmp_path):
    with pytest.raises(InputError, match=r"63 x 64 pixels; expected an even"):
        write_clip(tmp_path / "a.mp4", smooth_clip(1, 63, 64), FPS)
    assert not any(tmp_path.iterdir())


# --- The same bytes every time ---------------------------------------------------------------------------------------

SIZES = [(17, 64, 64), (17, 62, 90), (9, 34, 50), (2, 480, 832)]
"""Frames, height and width: multiples of 16, of 2 only, and a picture that x264 splits over threads by default."""

WRITE_EVERY_SIZE = """
import hashlib, os, sys
from pathlib import Path
from test_video import SIZES, smooth_clip
from tfm_jax.video import write_clip

if sys.argv[2] == "one core" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for size in SIZES:
    write_clip(Path(sys.argv[1]), smooth_clip(*size), 16)
    print(hashlib.sha256(Path(sys.argv[1]).read_bytes()).hexdigest())
"""


def test_a_file_does_not_depend_on_fresh_memory_or_cores(tmp_path):
    """glibc fills every new block of memory with a given byte: a read of uninitialised memory shows in the file."""
    programs = []
    for number, (fill, cores) in enumerate([("1", "all cores"), ("170", "one core"), ("254", "all cores")]):
        environment = os.environ | {"MALLOC_PERTURB_": fill, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", WRITE_EVERY_SIZE, str(tmp_path / f"{number}.mp4"), cores]
        programs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    first, *others = [program.communicate()[0].split() for program in programs]
    assert len(first) == len(SIZES)
    assert others == [first, first]


def test_files_and_pixels_are_the_same_under_load(tmp_path):
    done = threading.Event()

    def keep_busy() -> None:
        rng = np.random.default_rng(0)
        while not done.is_set():
            rng.integers(0, 256, rng.integers(1, 1_000_000), np.uint8)

    busy = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in busy:
        thread.start()
    try:
        for size in SIZES[:2]:
            clip, files, pixels = smooth_clip(*size), set(), set()
            for _ in range(10):
                write_clip(tmp_path / "a.mp4", clip, FPS)
                files.add(hashlib.sha256((tmp_path / "a.mp4").read_bytes()).hexdigest())
                pixels.add(hashlib.sha256(read_clip(tmp_path / "a.mp4", *size, FPS).tobytes()).hexdigest())
            assert (len(files), len(pixels)) == (1, 1), size
    finally:
        done.set()
        for thread in busy:
            thread.join()


# --- What is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "container", "codec"), [("mkv", "matroska", "libx264"), ("webm", "webm", "libvpx")])
def test_other_containers(tmp_path, suffix, container, codec):
    """Matroska has whole milliseconds only: 1 / 16 s is not one of them, and no frame may be missed for it."""
    path = encode(tmp_path / f"a.{suffix}", grey_clip(33), container=container, codec=codec)
    assert which(read_clip(path, 33, 64, 64, FPS)) == list(range(33))


@pytest.mark.parametrize(
    ("fps", "frames", "expected"),
    [(16, 17, list(range(17))), (8, 9, list(range(0, 18, 2))), (4, 5, list(range(0, 17, 4))), (24, 5, [0, 0, 1, 2, 2])],
)
def test_frames_are_picked_by_time(tmp_path, fps, frames, expected):
    path = encode(tmp_path / "a.mp4", grey_clip(17))
    assert which(read_clip(path, frames, 64, 64, fps)) == expected


def test_variable_frame_rate(tmp_path):
    path = encode(tmp_path / "a.mp4", grey_clip(6), stamps=[0, 0.1, 0.6, 0.7, 1.5, 1.6])
    #                            0  .1 .2 .3 .4 .5 .6 .7 .8 .9 1. 1.1 1.2 ...      1.5
    shown_at_tenths_of_a_second = [0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4]
    assert which(read_clip(path, 16, 64, 64, 10)) == shown_at_tenths_of_a_second


def test_a_clip_that_starts_late_starts_at_its_first_frame(tmp_path):
    path = encode(tmp_path / "a.mkv", grey_clip(5), stamps=[2 + i / 16 for i in range(5)], container="matroska")
    assert which(read_clip(path, 5, 64, 64, FPS)) == [0, 1, 2, 3, 4]


def display_matrix(a: float, b: float, c: float, d: float, u: float = 0) -> list[int]:
    """As the container holds it: 16.16 fixed point, in the last column 2.30."""
    return [round(n) for n in (a * 2**16, b * 2**16, u * 2**30, c * 2**16, d * 2**16, 0, 0, 0, 2**30)]


@pytest.mark.parametrize("rotation", [90, -90, 180])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_rotation_is_honoured(tmp_path, rotation, suffix):
    clip = smooth_clip(3)
    container = {"mp4": "mp4", "mkv": "matroska"}[suffix]
    path = encode(tmp_path / f"a.{suffix}", clip, rotation=rotation, container=container)
    upright = np.rot90(clip, rotation // 90, axes=(1, 2))
    assert psnr(read_clip(path, 3, *upright.shape[1:3], FPS), upright) > 30


@pytest.mark.parametrize("x_to_y", [False, True])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_all_eight_orientations(tmp_path, signs, x_to_y):
    """The expected picture comes from moving every pixel by the matrix, as FFmpeg defines it."""
    clip = smooth_clip(2)
    a, b, c, d = (0, signs[0], signs[1], 0) if x_to_y else (signs[0], 0, 0, signs[1])
    q, p = np.mgrid[:64, :96]
    x, y = a * p + c * q, b * p + d * q
    shown = np.zeros((2, *((96, 64) if x_to_y else (64, 96)), 3), np.uint8)
    shown[:, y - y.min(), x - x.min()] = clip
    path = encode(tmp_path / "a.mp4", clip, matrix=display_matrix(a, b, c, d))
    assert psnr(read_clip(path, 2, *shown.shape[1:3], FPS), shown) > 30


def test_a_mirrored_clip_by_its_corners(tmp_path):
    """Red is stored on the upper left: flipped horizontally it is on the upper right."""
    clip = np.zeros((1, 32, 32, 3), np.uint8)
    clip[:, :16, :16, 0] = 255
    shown = read_clip(encode(tmp_path / "a.mp4", clip, matrix=display_matrix(-1, 0, 0, 1)), 1, 32, 32, FPS)
    assert [bool(shown[0, y, x, 0] > 200) for y, x in ((4, 4), (4, 28), (28, 4), (28, 28))] == [
        False,
        True,
        False,
        False,
    ]


def test_scale_in_the_display_matrix_does_not_turn(tmp_path):
    clip = smooth_clip(1)
    path = encode(tmp_path / "a.mp4", clip, matrix=display_matrix(2, 0, 0, 2))
    assert psnr(read_clip(path, 1, 64, 96, FPS), clip) > 30


@pytest.mark.parametrize(
    "matrix",
    [
        display_matrix(0.7071, 0.7071, -0.7071, 0.7071),  # 45 degrees
        display_matrix(0.9986, 0.0523, -0.0523, 0.9986),  # 3 degrees
        display_matrix(1, 0, 1, 0),  # both axes on one
        display_matrix(1, 0, 0.3, 1),  # sheared
        display_matrix(0, 0, 0, 1),
        display_matrix(1, 0, 0, 1, u=0.5),  # perspective
    ],
)
def test_other_display_matrices_are_refused(tmp_path, matrix):
    refused(
        encode(tmp_path / "a.mp4", smooth_clip(1), matrix=matrix), r"display matrix \[.*\]; expected flips", frames=1
    )


def test_cover_and_centre_crop(tmp_path):
    clip = np.zeros((1, 64, 128, 3), np.uint8)
    clip[:, :, 32:96] = 200  # the centred square
    path = encode(tmp_path / "a.mp4", clip)
    assert np.abs(read_clip(path, 1, 32, 32, FPS).astype(int) - 200)[:, :, 1:-1].max() <= 5
    wide = read_clip(path, 1, 32, 128, FPS)  # top and bottom go, the square stays 64 wide
    assert wide[0, 16, 40:88].min() > 190
    assert wide[0, 16, :28].max() < 10


@pytest.mark.parametrize(("columns", "aspect"), [(256, Fraction(1, 2)), (64, Fraction(2))])
def test_pixels_that_are_not_square(tmp_path, columns, aspect):
    """Stored with too many or too few columns for the square picture that is shown."""
    clip = smooth_clip(1, 128, columns)
    path = encode(tmp_path / "a.mp4", clip, aspect=aspect)
    whole = np.asarray(Image.fromarray(clip[0]).resize((128, 128), Image.Resampling.BICUBIC))
    assert psnr(read_clip(path, 1, 128, 128, FPS)[0], whole) > 30


def test_scaling_is_antialiased(tmp_path):
    stripes = np.zeros((1, 256, 256, 3), np.uint8)
    stripes[:, :, ::4] = stripes[:, :, 1::4] = 255
    small = read_clip(encode(tmp_path / "a.mp4", stripes), 1, 32, 32, FPS)
    assert np.abs(small.astype(int) - 127).max() < 20


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p"])
def test_other_pixel_formats(tmp_path, pix_fmt):
    clip = smooth_clip(3)
    assert psnr(read_clip(encode(tmp_path / "a.mp4", clip, pix_fmt=pix_fmt), 3, 64, 96, FPS), clip) > 30


def test_odd_size_is_read(tmp_path):
    path = encode(tmp_path / "a.mp4", smooth_clip(3, 63, 97), pix_fmt="yuv444p")
    assert read_clip(path, 3, 64, 96, FPS).shape == (3, 64, 96, 3)


# --- What is refused -------------------------------------------------------------------------------------------------


def refused(path: Path, match: str, frames: int = 17) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_clip(path, frames, 64, 64, FPS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_too_short(tmp_path, container):
    suffix = {"mp4": "mp4", "matroska": "mkv"}[container]
    path = encode(tmp_path / f"a.{suffix}", grey_clip(16), container=container)
    assert len(read_clip(path, 16, 64, 64, FPS)) == 16
    refused(path, r"16 frames, 1.00 s long; expected enough for 17 frames, the last one at 1.00 s")


def test_one_frame(tmp_path):
    path = encode(tmp_path / "a.mp4", grey_clip(1))
    assert which(read_clip(path, 1, 64, 64, FPS)) == [0]
    refused(path, "1 frames", frames=5)


def test_no_file_and_unknown_kind(tmp_path):
    refused(tmp_path / "none.mp4", "no such file")
    (tmp_path / "folder.mp4").mkdir()
    refused(tmp_path / "folder.mp4", "no such file")
    (tmp_path / "a.avi").write_bytes(b"RIFF")
    refused(tmp_path / "a.avi", r"unknown file type; expected one of \.mp4")


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n", b"ffconcat version 1.0"]
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_not_a_video(tmp_path, content, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    refused(path, "damaged or not a video")


def test_audio_only(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(path, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    refused(path, "no video stream")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_truncated(tmp_path, kept):
    """The index comes first in what `write_clip` writes, so the file opens and even promises all frames."""
    path = tmp_path / "a.mp4"
    write_clip(path, smooth_clip(), FPS)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refused(path, "expected")


def test_damaged_data(tmp_path):
    """Sixteen places are overwritten in turn. The format has no checksum, but most of it must not go unnoticed."""
    path = tmp_path / "a.mp4"
    write_clip(path, smooth_clip(17, 192, 256), FPS)
    content, noticed = path.read_bytes(), []
    start = content.index(b"mdat") + 1000  # behind the encoder's settings
    for place in np.linspace(start, len(content) - 400, 16).astype(int):
        path.write_bytes(content[:place] + bytes(200) + content[place + 200 :])
        try:
            read_clip(path, 17, 192, 256, FPS)
        except InputError as error:
            noticed.append(str(error))
    assert all(message.startswith(str(path)) for message in noticed)
    assert len(noticed) >= 12


def test_frames_of_an_absurd_size(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", grey_clip(1, 128, 128))
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 128 * 127)
    refused(path, r"frames of 128 x 128 pixels; expected at most 16,256", frames=1)


def test_the_decoder_checks_the_size_too(tmp_path, monkeypatch):
    """The size may change within the stream, behind the header that was checked."""

    class PassesTheFirstCheck(int):
        def __lt__(self, other):
            return False

    path = encode(tmp_path / "a.mp4", grey_clip(1, 128, 128))
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", PassesTheFirstCheck(1000))
    refused(path, "damaged or not a video", frames=1)


MEASURE_REFUSAL = """
import re, sys
from pathlib import Path
from tfm_jax.errors import InputError
from tfm_jax.video import read_clip

try:
    read_clip(Path(sys.argv[1]), 1, 64, 64, 16)
except InputError as error:
    print(error)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path):
    """Opening the file must not decode it either: that alone would take 200 MB and more."""
    path = encode(tmp_path / "a.mp4", np.zeros((1, 12288, 12288, 3), np.uint8))
    done = subprocess.run([sys.executable, "-c", MEASURE_REFUSAL, str(path)], capture_output=True, text=True)
    message, peak = done.stdout.splitlines()
    assert "frames of 12288 x 12288 pixels" in message
    assert int(peak) < 250_000


def test_a_codec_without_a_decoder(tmp_path):
    path = encode(tmp_path / "a.mp4", smooth_clip(1))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    refused(path, "no decoder for its video stream", frames=1)


def test_frames_that_go_back_in_time(tmp_path):
    """A Matroska block holds its own time in milliseconds, and one frame of this codec."""
    path = encode(tmp_path / "a.mkv", grey_clip(4), container="matroska", codec="mjpeg", pix_fmt="yuvj420p")
    third = b"\x81" + (125).to_bytes(2, "big") + b"\x80\xff\xd8"
    assert path.read_bytes().count(third) == 1
    path.write_bytes(path.read_bytes().replace(third, b"\x81" + (10).to_bytes(2, "big") + b"\x80\xff\xd8"))
    refused(path, "frame 2 is shown before frame 1", frames=4)


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, removed or inserted, half of the places in the header."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place, size = int(rng.integers(min(len(data), rng.choice([len(data), 1200])))), int(rng.integers(1, 20))
        match rng.integers(4):
            case 0:
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data[place : place + 4] = rng.choice([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]).astype(">u4").tobytes()
            case 2:
                del data[place : place + size]
            case 3:
                data[place:place] = rng.bytes(size)
    return bytes(data)


def check_damaged_files(folder: Path, stride: int, damages: int) -> None:
    """Pixels of the right shape or an InputError in one line, whatever the bytes."""
    rng = np.random.default_rng(0)
    for name, container in (("a.mp4", "mp4"), ("a.mkv", "matroska"), ("a.mov", "mov")):
        path = encode(folder / name, smooth_clip(3, 32, 48), container=container, rotation=90)
        content, messages = path.read_bytes(), []
        cut = [content[:length] for length in range(0, len(content), stride)]
        for data in cut + [damage(content, rng) for _ in range(damages)]:
            path.write_bytes(data)
            try:
                pixels = read_clip(path, 3, 48, 32, FPS)
            except InputError as error:
                messages.append(str(error))
            else:
                assert pixels.shape == (3, 48, 32, 3)
        assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


def test_cut_and_damaged_files(tmp_path):
    check_damaged_files(tmp_path, stride=13, damages=100)


@pytest.mark.slow
def test_files_cut_everywhere_and_thousands_of_damaged_ones(tmp_path):
    check_damaged_files(tmp_path, stride=1, damages=2000)


# --- Values and pictures ---------------------------------------------------------------------------------------------


def test_value_ranges():
    values = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    assert np.array_equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values).min() == -1
    assert from_uint8(values).max() == 1
    assert to_uint8(np.array([[-3.0, 0.0, 7.0]], np.float32)).tolist() == [[0, 128, 255]]


def test_contact_sheet():
    red, blue = np.zeros((17, 64, 64, 3), np.uint8), np.zeros((5, 32, 64, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = np.asarray(contact_sheet([red, blue], ["one " * 200, "two"], columns=3, cell=100))
    pure = [(sheet == colour).all(-1).sum() for colour in ([255, 0, 0], [0, 0, 255])]
    assert pure == [3 * 100 * 100, 3 * 100 * 50]
    assert (sheet.sum(-1) < 100).any()  # the ink of the labels
    single = contact_sheet([red[:1]], [""], columns=3, cell=100)
    assert single.width == sheet.shape[1]
