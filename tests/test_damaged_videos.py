"""Video files that are refused: too short, damaged, not a video, or of an absurd size."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.clips import FPS, display_matrix, encode, grey_clip, smooth_clip, which, write_sound

from tfm_jax import video
from tfm_jax.errors import InputError
from tfm_jax.video import read_clip, write_clip
from tfm_jax.video_headers import MAX_SECONDS, read_header


def refused(path: Path, match: str, frames: int = 17) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_clip(path, frames, 64, 64, FPS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_too_short(tmp_path, container):
    suffix = {"mp4": "mp4", "matroska": "mkv"}[container]
    path = encode(tmp_path / f"a.{suffix}", grey_clip(16), container=container)
    assert len(read_clip(path, 16, 64, 64, FPS)) == 16
    refused(path, r"16 frames and lasts 1.00 s; expected enough for 17 frames, the last one at 1.00 s")


def test_one_frame(tmp_path):
    path = encode(tmp_path / "a.mp4", grey_clip(1))
    assert which(read_clip(path, 1, 64, 64, FPS)) == [0]
    refused(path, "1 frames", frames=5)


def test_missing_file_and_unknown_type(tmp_path):
    refused(tmp_path / "none.mp4", "no such file")
    (tmp_path / "folder.mp4").mkdir()
    refused(tmp_path / "folder.mp4", "no such file")
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    refused(tmp_path / "a.gif", r"unknown file type; expected one of \.mp4")


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n", b"ffconcat version 1.0"]
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "wmv", "flv"])
def test_not_a_video(tmp_path, content, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    refused(path, "damaged or not a video")


def test_audio_only(tmp_path):
    path = tmp_path / "a.mp4"
    write_sound(path)
    refused(path, "no video stream")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_truncated(tmp_path, kept):
    """`write_clip` puts the index first, so the file opens and even claims to have all frames."""
    path = tmp_path / "a.mp4"
    write_clip(path, smooth_clip(), FPS)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refused(path, "expected")


@pytest.mark.parametrize(("suffix", "container", "codec"), [("avi", "avi", "mpeg4"), ("wmv", "asf", "wmv2")])
def test_old_containers_cut(tmp_path, suffix, container, codec):
    cut_everywhere(encode(tmp_path / f"a.{suffix}", smooth_clip(), container=container, codec=codec), 500)


def test_flv_cut(tmp_path, capfd):
    """The demuxer looks for the duration at the end and follows what it finds there, even before the file's start."""
    cut_everywhere(encode(tmp_path / "a.flv", smooth_clip(), container="flv", codec="flv"), 499)
    assert "Traceback" not in capfd.readouterr().err


def cut_everywhere(path: Path, stride: int) -> None:
    """Cut a file of 17 frames at many places in its first half, where frames are missing."""
    content = path.read_bytes()
    for length in range(0, len(content) // 2, stride):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="expected") as caught:
            read_clip(path, 17, 64, 96, FPS)
        assert str(caught.value).startswith(f"{path}: ")


def test_damaged_data(tmp_path):
    """Sixteen places are overwritten in turn. The format has no checksum, but most damage must be noticed."""
    path = tmp_path / "a.mp4"
    write_clip(path, smooth_clip(17, 192, 256), FPS)
    content, noticed = path.read_bytes(), []
    start = content.index(b"mdat") + 1000  # after the settings of the encoder
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
    """The size may change within the stream, after the header that was checked."""

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
def test_a_large_picture_is_refused_before_decoding(tmp_path):
    """Opening the file must not decode it either: that would take at least 200 MB."""
    path = encode(tmp_path / "a.mp4", np.zeros((1, 12288, 12288, 3), np.uint8))
    done = subprocess.run([sys.executable, "-c", MEASURE_REFUSAL, str(path)], capture_output=True, text=True)
    message, peak = done.stdout.splitlines()
    assert "frames of 12288 x 12288 pixels" in message
    assert int(peak) < 250_000


def test_a_codec_without_a_decoder(tmp_path):
    path = encode(tmp_path / "a.mp4", smooth_clip(1))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    refused(path, "no decoder for the video stream", frames=1)


def test_frames_that_go_back_in_time(tmp_path):
    """A Matroska block contains its time in milliseconds and one frame of this codec."""
    path = encode(tmp_path / "a.mkv", grey_clip(4), container="matroska", codec="mjpeg", pix_fmt="yuvj420p")
    third = b"\x81" + (125).to_bytes(2, "big") + b"\x80\xff\xd8"
    assert path.read_bytes().count(third) == 1
    path.write_bytes(path.read_bytes().replace(third, b"\x81" + (10).to_bytes(2, "big") + b"\x80\xff\xd8"))
    refused(path, "frame 2 is shown before frame 1", frames=4)


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, remove or insert a few bytes, half of the time in the header."""
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
    """Damaged files give a header and pixels of the right shape, or an InputError of one line."""
    rng = np.random.default_rng(0)
    for name, container in (("a.mp4", "mp4"), ("a.mkv", "matroska"), ("a.mov", "mov")):
        path = encode(folder / name, smooth_clip(3, 32, 48), container=container, rotation=90)
        content, messages = path.read_bytes(), []
        cut = [content[:length] for length in range(0, len(content), stride)]
        for data in cut + [damage(content, rng) for _ in range(damages)]:
            path.write_bytes(data)
            try:
                assert 0 <= read_header(path).frames_at(FPS) <= FPS * MAX_SECONDS
            except InputError as error:
                messages.append(str(error))
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
