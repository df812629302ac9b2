"""`tfm-evaluate --vbench`: the table, the numbers in the JSON file, and bad input."""

import json
import shutil
import sys
from fractions import Fraction

import numpy as np
import pytest
from helpers.clips import smooth_clip

from tfm_jax import video
from tfm_jax.footage import flow
from tfm_jax.footage.dynamics import Dynamics
from tfm_jax.footage.flickering import Flickering
from tfm_jax.footage.measuring import TITLES
from tfm_jax.footage.smoothness import Smoothness

METRICS = [
    "temporal_flickering", "smoothness_optical_flow", "dynamic_degree_optical_flow", "speed_optical_flow",
]  # fmt: skip
NAMES = ["9.mp4", "10.mp4", "11.mp4"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Clips in which the picture stands still, and the same clips with motion."""
    folder = tmp_path_factory.mktemp("samples")
    for number, name in enumerate(NAMES):
        clip = smooth_clip(9, 48, 64, seed=number)
        (folder / "base").mkdir(exist_ok=True)
        (folder / "lora").mkdir(exist_ok=True)
        video.write_clip(folder / "base" / name, clip[[0] * 9], 16)
        video.write_clip(folder / "lora" / name, clip, 16)
    return folder


def test_two_folders_and_a_reference(call, samples, tmp_path):
    (tmp_path / "real").mkdir()
    shutil.copy(samples / "lora/9.mp4", tmp_path / "real/other.MP4")
    folders = [samples / "base", samples / "lora"]
    outcome = call("evaluate", "--vbench", *folders, f"--reference={tmp_path}/real", f"--json={tmp_path}/a.json")
    assert outcome.code == 0, outcome.err
    title, *rows = outcome.out.splitlines()
    assert title.split("  ")[0] == "mean [95% interval over the videos]"
    assert title.split()[-6:] == ["base", "lora", "reference", "lora", "less", "base"]
    assert [row[:40].split("  ")[0] for row in rows] == [TITLES[metric] for metric in METRICS]

    found = json.loads((tmp_path / "a.json").read_text())
    assert list(found) == ["base", "lora", "reference", "difference"]
    assert list(found["base"]["videos"]) == NAMES
    assert list(found["reference"]["videos"]) == ["other.MP4"]
    assert found["reference"]["videos"]["other.MP4"] == found["lora"]["videos"]["9.mp4"]
    for metric in METRICS:
        values = {name: [each[metric] for each in found[name]["videos"].values()] for name in found}
        assert values["difference"] == pytest.approx(np.subtract(values["lora"], values["base"]))
        for name in found:
            assert found[name]["mean"][metric] == pytest.approx(np.mean(values[name]))
            low, high = found[name]["interval"][metric]
            ordered = [min(values[name]), low, found[name]["mean"][metric], high, max(values[name])]
            assert (np.diff(ordered) >= -1e-12).all()
    assert found["difference"]["interval"]["temporal_flickering"][1] < 0
    assert found["lora"]["mean"]["speed_optical_flow"] == pytest.approx(np.sqrt(2), rel=0.1)


def test_the_values_of_a_video_are_those_of_its_frames(call, samples, tmp_path):
    assert call("evaluate", "--vbench", samples / "lora", f"--json={tmp_path}/a.json").code == 0
    metrics = Flickering(), Smoothness(), Dynamics(Fraction(16))
    for frame in video.read_clip(samples / "lora/10.mp4", 9, 48, 64, 16):
        for metric in metrics:
            metric.add(frame)
    expected = {name: value for metric in metrics for name, value in metric.values().items()}
    [name] = (found := json.loads((tmp_path / "a.json").read_text()))
    assert name == "lora"
    assert found["lora"]["videos"]["10.mp4"] == pytest.approx(expected)


def copied(samples, folder):
    for name in ("base", "lora"):
        shutil.copytree(samples / name, folder / name)


def clip(frames: int, height: int = 48, width: int = 64, fps: int = 16):
    return lambda file: video.write_clip(file, smooth_clip(frames, height, width), fps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.write_text("text"), "10.mp4: is damaged or not a video"),
        (lambda file: file.write_bytes(file.read_bytes()[:-400]), "10.mp4: is damaged or not a video"),
        (lambda file: file.unlink(), "lora: contains no 10.mp4, unlike "),
        (lambda file: file.rename(file.with_name("new.mp4")), "lora: contains no 10.mp4, unlike "),
        (lambda file: shutil.copy(file, file.with_name("new.mp4")), "base: contains no new.mp4, unlike "),
        (clip(4), "10.mp4: has 4 frames; expected at least 5, at 16 fps"),
        (clip(1), "10.mp4: has 1 frame; expected at least 5, at 16 fps"),
        (
            clip(9, fps=30),
            "10.mp4: has 9 frames of 48 x 64 pixels at 30 fps; expected 9 frames of 48 x 64",
        ),
        (clip(9, 64, 64), "10.mp4: has 9 frames of 64 x 64 pixels at 16 fps; expected 9 frames of 48 x 64 pixels"),
        (clip(8), "10.mp4: has 8 frames of 48 x 64 pixels at 16 fps; expected 9 frames"),
        (lambda file: shutil.rmtree(file.parent), "lora: no such folder; expected a folder of videos"),
        (lambda file: [each.unlink() for each in file.parent.iterdir()], "lora: contains no videos"),
    ],
)
def test_bad_videos(call, samples, tmp_path, change, words):
    copied(samples, tmp_path)
    change(tmp_path / "lora" / "10.mp4")
    outcome = call("evaluate", "--vbench", tmp_path / "base", tmp_path / "lora", f"--json={tmp_path}/a.json")
    assert outcome.code == 2
    assert words in outcome.err.splitlines()[-1]
    assert not (tmp_path / "a.json").exists()


def refused(call, words: str, *arguments) -> None:
    outcome = call("evaluate", "--vbench", *arguments)
    assert outcome.code == 2
    assert words in outcome.err.splitlines()[-1], outcome.err


def test_bad_options(call, samples, tmp_path, monkeypatch):
    base = samples / "base"
    (tmp_path / "small").mkdir()
    video.write_clip(tmp_path / "small/0.mp4", smooth_clip(5, 12, 64), 16)
    refused(call, "0.mp4: frame 0 has 12 x 64 pixels; expected at least 16 x 16", tmp_path / "small")
    refused(call, "base: 2 folders have this name", base, base)
    shutil.copytree(base, tmp_path / "reference")
    refused(call, "reference: a folder has the name of a column", tmp_path / "reference")
    refused(call, "none/a.json: cannot be written", base, f"--json={tmp_path}/none/a.json")
    refused(call, "none: no such folder", base, f"--reference={tmp_path}/none")
    refused(call, "none: no such folder", base, f"--dino={tmp_path}/none")
    outcome = call("evaluate", "--vbench", base, "--frames=9")
    assert outcome.code == 2
    assert "--frames" in outcome.err
    frames = iter([smooth_clip(1, 48, 64)[0], smooth_clip(1, 64, 64)[0]])
    with monkeypatch.context() as patched:
        patched.setattr(video, "read_frames", lambda file: frames)
        refused(call, "9.mp4: frame 1 has 64 x 64 pixels; expected 48 x 64, like the first frame", base)
    monkeypatch.setitem(sys.modules, "cv2", None)
    flow.opencv.cache_clear()
    flow._estimator.cache_clear()
    refused(call, "--vbench needs OpenCV, for optical flow; run pip install 'tfm-jax[footage]'", base)


def test_help(call):
    outcome = call("evaluate", "--vbench", "--help")
    assert outcome.code == 0
    assert "tfm-evaluate --vbench" in outcome.out
    assert "--dino" in outcome.out
    assert "--vbench" in call("evaluate", "--help").out
