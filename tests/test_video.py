"""Video files that are written and read: the pixels, the choice of frames, and the bytes."""

import hashlib
import os
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers.clips import FPS, SIZES, display_matrix, encode, grey_clip, psnr, smooth_clip, which
from PIL import Image

from tfm_jax import video
from tfm_jax.errors import InputError
from tfm_jax.video import contact_sheet, from_uint8, read_clip, read_windows, to_uint8, write_clip


def test_mp4_round_trip(tmp_path):
    clip = smooth_clip()
    write_clip(tmp_path / "a b.mp4", clip, FPS)
    again = read_clip(tmp_path / "a b.mp4", 17, 64, 96, FPS)
    assert again.shape == clip.shape
    assert again.dtype == np.uint8
    assert psnr(again, clip) > 35
    assert abs(float((again.astype(float) - clip).mean())) < 1
    assert [file.name for file in tmp_path.iterdir()] == ["a b.mp4"]


@pytest.mark.parametrize("options", [{}, {"rotation": 90}, {"container": "avi", "codec": "mpeg4"}], ids=str)
def test_frames_one_by_one(tmp_path, options):
    """They are those of `read_windows` at the size of the file, upright."""
    file = encode(tmp_path / f"a.{options.get('container', 'mp4')}", smooth_clip(7), **options)
    frames = list(video.read_frames(file))
    height, width = (96, 64) if "rotation" in options else (64, 96)
    [expected] = read_windows(file, [0], 7, height, width, "native")
    assert np.array_equal(frames, expected)


def test_pure_colours_survive(tmp_path):
    """A matrix or range that differs between writing and reading shifts colours by 10 and more."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 60, 90]], np.uint8)
    clip = np.broadcast_to(colours[:, None, None], (6, 32, 32, 3))
    write_clip(tmp_path / "a.mp4", clip, FPS)
    assert np.abs(read_clip(tmp_path / "a.mp4", 6, 32, 32, FPS).astype(int) - clip).max() <= 5


def test_writing_replaces_the_file_and_a_failure_keeps_the_old_one(tmp_path, monkeypatch):
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

WRITE_EVERY_SIZE = """
import hashlib, os, sys
from pathlib import Path
from helpers.clips import SIZES, smooth_clip
from tfm_jax.video import write_clip

if sys.argv[2] == "one core" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for size in SIZES:
    write_clip(Path(sys.argv[1]), smooth_clip(*size), 16)
    print(hashlib.sha256(Path(sys.argv[1]).read_bytes()).hexdigest())
"""


def test_a_file_does_not_depend_on_fresh_memory_or_cores(tmp_path):
    """glibc fills new memory with a given byte, so that reads of uninitialised memory change the file."""
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


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "container", "codec"), [("mkv", "matroska", "libx264"), ("webm", "webm", "libvpx")])
def test_other_containers(tmp_path, suffix, container, codec):
    """Matroska rounds 1 / 16 s to whole milliseconds; no frame may be missed because of it."""
    path = encode(tmp_path / f"a.{suffix}", grey_clip(33), container=container, codec=codec)
    assert which(read_clip(path, 33, 64, 64, FPS)) == list(range(33))


@pytest.mark.parametrize("frames", [33, 2, 1])
@pytest.mark.parametrize(
    ("suffix", "container", "codec", "pix_fmt", "b_frames"),
    [
        ("avi", "avi", "mpeg4", "yuv420p", 0),
        ("avi", "avi", "mpeg4", "yuv420p", 2),
        ("avi", "avi", "libx264", "yuv420p", 2),
        ("AVI", "avi", "mjpeg", "yuvj420p", 0),
        ("wmv", "asf", "wmv2", "yuv420p", 0),
        ("flv", "flv", "flv", "yuv420p", 0),
        ("flv", "flv", "libx264", "yuv420p", 2),
    ],
)
def test_old_containers(tmp_path, suffix, container, codec, pix_fmt, b_frames, frames):
    """AVI stores no presentation times, although B-frames are shown in another order than they are decoded."""
    options = {"container": container, "codec": codec, "pix_fmt": pix_fmt, "b_frames": b_frames}
    path = encode(tmp_path / f"a.{suffix}", grey_clip(frames), **options)
    assert which(read_clip(path, frames, 64, 64, FPS)) == list(range(frames))


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
    """The expected picture is made by moving every pixel with the matrix, as FFmpeg defines it."""
    clip = smooth_clip(2)
    a, b, c, d = (0, signs[0], signs[1], 0) if x_to_y else (signs[0], 0, 0, signs[1])
    q, p = np.mgrid[:64, :96]
    x, y = a * p + c * q, b * p + d * q
    shown = np.zeros((2, *((96, 64) if x_to_y else (64, 96)), 3), np.uint8)
    shown[:, y - y.min(), x - x.min()] = clip
    path = encode(tmp_path / "a.mp4", clip, matrix=display_matrix(a, b, c, d))
    assert psnr(read_clip(path, 2, *shown.shape[1:3], FPS), shown) > 30


def test_a_mirrored_clip_by_its_corners(tmp_path):
    """Red is stored in the upper left corner; flipped horizontally, it is in the upper right one."""
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
    """The square picture is stored with too many or too few columns."""
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


# --- Windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "container"), [("mp4", "mp4"), ("mkv", "matroska"), ("avi", "avi")])
@pytest.mark.parametrize("fps", [FPS, "native"])
def test_windows_are_read_in_one_pass(tmp_path, suffix, container, fps, monkeypatch):
    path = encode(tmp_path / f"a.{suffix}", grey_clip(40), container=container)
    opened = []
    original = video._video_stream
    monkeypatch.setattr(video, "_video_stream", lambda *args: (opened.append(1), original(*args))[1])
    found = [which(clip) for clip in read_windows(path, [3, 8, 35], 5, 64, 64, fps)]
    assert found == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [35, 36, 37, 38, 39]]
    assert len(opened) == 1


def test_windows_at_another_rate(tmp_path):
    path = encode(tmp_path / "a.mp4", grey_clip(17))  # 16 frames a second
    assert [which(clip) for clip in read_windows(path, [1, 4], 3, 64, 64, 8)] == [[2, 4, 6], [8, 10, 12]]


def test_native_frames_do_not_depend_on_their_times(tmp_path):
    path = encode(tmp_path / "a.mp4", grey_clip(6), stamps=[0, 0.1, 0.6, 0.7, 1.5, 1.6])
    assert [which(clip) for clip in read_windows(path, [0, 4], 2, 64, 64, "native")] == [[0, 1], [4, 5]]


def test_a_window_beyond_the_end(tmp_path):
    path = encode(tmp_path / "a.mp4", grey_clip(9))
    clips = read_windows(path, [0, 5], 5, 64, 64, "native")
    assert which(next(clips)) == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match=r"a.mp4: has 9 frames; expected at least 10"):
        next(clips)
    with pytest.raises(InputError, match=r"9 frames and lasts 0.56 s; expected enough for 10 frames, the last one at"):
        list(read_windows(path, [0, 5], 5, 64, 64, FPS))


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
