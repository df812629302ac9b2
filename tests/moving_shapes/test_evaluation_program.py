"""tfm-evaluate: what it prints and writes, bad input, and where the sizes of the clips come from."""

import json
import shutil
import sys
from functools import partial

import numpy as np
import pytest
from helpers.tiny_world import execute

from tfm_jax import video
from tfm_jax.cli import command
from tfm_jax.errors import InputError
from tfm_jax.moving_shapes.evaluation.folders import find_captioned_clips
from tfm_jax.moving_shapes.evaluation.intervals import METRICS
from tfm_jax.moving_shapes.world import make_scene, write_clips
from tfm_jax.video import write_clip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six real clips, and three generated ones with their prompts, named as tfm-sample names them."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder / "real", 6, frames=9, seed=1, laws=["uniform"])
    (folder / "samples").mkdir()
    clips = [make_scene(np.random.default_rng((11, number)), laws=["uniform"], frames=9) for number in range(3)]
    for number, clip in enumerate(clips):
        write_clip(folder / "samples" / f"{number:03d}.mp4", clip.pixels, 16)
    (folder / "prompts.txt").write_text("\n".join([c.caption for c in clips]), encoding="utf-8")
    return folder


def evaluate(*arguments) -> None:
    *folders, reference = [argument for argument in arguments if not str(argument).startswith("--")]
    options = [argument for argument in arguments if str(argument).startswith("--")]
    execute("evaluate", [str(argument) for argument in (*folders, f"--reference={reference}", *options)])


def test_the_program(folders, tmp_path, capsys):
    options = ["--frames=9", f"--prompts={folders}/prompts.txt", f"--json={tmp_path}/numbers.json"]
    evaluate(folders / "samples", folders / "real", *options)
    printed = capsys.readouterr().out
    assert "physics residual R" in printed
    assert (
        "3 generated clips, 6 reference clips; "
        "floor: the difference between random halves of the reference, 3 clips each" in printed
    )
    assert "measuring it needs a network" in printed
    numbers = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["clips"] == {"generated": 3, "reference": 6, "compared": 3}
    for share in ("tracked", "faithful", "moving", "whole", "colours", "shapes", "directions"):
        assert numbers["metrics"][share] == {"samples": 1, "reference": 1, "floor": 0}
    assert numbers["metrics"]["frechet"]["reference"] is None
    assert numbers["metrics"]["frechet"]["floor"] > 0
    assert numbers["thresholds"]["faithful"] == 0.5
    assert numbers["intervals"]["faithful"] == {"samples": [1, 1]}
    assert "less" not in printed


def test_clips_are_sorted_by_number(tmp_path):
    names = ["1.mp4", "02.mp4", "9.mp4", "101.mp4", "999.mp4", "1000.mp4", "a2.mp4", "a10.mp4", "a10b.mp4"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [file.name for file in video.find_clips(tmp_path)] == names
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([f"caption\u2028of {name}" for name in names]), encoding="utf-8")
    for path, caption in find_captioned_clips(tmp_path, prompts, minimum=2):
        assert caption == f"caption\u2028of {path.name}"


def test_folders_side_by_side(folders, tmp_path, capsys):
    shutil.copytree(folders / "samples", tmp_path / "others")
    evaluate(folders / "samples", tmp_path / "others", folders / "real", "--frames=9")
    printed = capsys.readouterr().out
    header, first, *_ = printed.splitlines()
    assert header.split() == ["samples", "others", "reference", "floor"]
    assert first.split()[-4:] == ["1", "1", "1", "0"]
    assert "less" not in printed  # without captions, nothing says that the prompts are the same


def test_the_difference_between_two_folders_with_the_same_prompts(folders, tmp_path, capsys):
    shutil.copytree(folders / "samples", tmp_path / "others")
    options = ["--frames=9", f"--prompts={folders}/prompts.txt", f"--json={tmp_path}/numbers.json"]
    evaluate(folders / "samples", tmp_path / "others", folders / "real", *options)
    lines = capsys.readouterr().out.splitlines()
    title = next(line for line in lines if line.startswith("95% bootstrap intervals"))
    assert title.split()[-5:] == ["samples", "others", "others", "less", "samples"]
    residual = [line for line in lines if line.startswith("physics residual R")][1]
    assert residual.endswith(" 0 [0, 0]")
    assert all(len(line) <= 120 for line in lines)
    intervals = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))["intervals"]
    assert list(intervals) == list(METRICS)
    assert all(list(found) == ["samples", "others", "difference"] for found in intervals.values())
    assert intervals["residual"]["difference"] == [0, 0]
    low, high = intervals["residual"]["samples"]
    assert 0 < low < high < 0.5


def test_without_captions(folders, tmp_path, capsys):
    evaluate(folders / "samples", folders / "real", "--frames=9", f"--json={tmp_path}/numbers.json")
    found = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))["metrics"]
    assert found["colours"]["samples"] is None
    assert capsys.readouterr().out.count("clips with the right colours") == 1  # it has no intervals
    assert found["faithful"]["samples"] == found["whole"]["samples"] == 1


def test_bad_input(folders, tmp_path, capsys):
    def refused(message: str, *arguments) -> None:
        with pytest.raises(InputError, match=message) as caught:
            evaluate(*arguments)
        assert "\n" not in str(caught.value)

    samples, real = folders / "samples", folders / "real"
    (tmp_path / "two.txt").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    refused("none: no such folder; expected a folder of mp4 files", tmp_path / "none", real)
    refused(r"real: no such folder", samples, tmp_path / "real", "--frames=9")
    refused(r": 0 mp4 files; expected at least 2", tmp_path, real)
    refused(r"samples: 3 mp4 files; expected at least 4", samples, samples, "--frames=9")
    refused(r"000.mp4: has 9 frames .* expected enough for 17 frames", samples, real)
    refused(r"two.txt: 2 captions; expected 3, one per mp4 file", samples, real, f"--prompts={tmp_path}/two.txt")
    refused(r"latin.txt: byte 3 is not UTF-8; expected UTF-8 text", samples, real, f"--prompts={tmp_path}/latin.txt")
    refused(r"none.txt: .*No such file", samples, real, f"--prompts={tmp_path}/none.txt")
    refused(r"--frames=2: expected 5 to 1000", samples, real, "--frames=2")
    for fps in ("nan", "inf", "-inf", "0", "1e300"):
        refused(r"--fps=.*: expected (1 to 1000|a finite number)", samples, real, f"--fps={fps}")
    refused(r"--height=1000000: expected 16 to 4096", samples, real, "--height=1000000", "--width=1000000")
    large = ["--frames=81", "--height=4096", "--width=4096"]
    refused(
        r"81 frames of 4096 x 4096: 1,358,954,496 pixels per clip; expected at most 100,000,000", samples, real, *large
    )
    refused(r"--json=.*none/a.json: cannot be written", samples, real, f"--json={tmp_path}/none/a.json")
    refused(r"--json=.*: cannot be written", samples, real, f"--json={tmp_path}")
    with pytest.raises(SystemExit, match="2"):
        execute("evaluate", [str(samples)])
    assert "--reference PATH" in capsys.readouterr().err
    refused(r"samples: 2 folders have this name; expected different names", samples, samples, real, "--frames=9")
    shutil.copytree(samples, tmp_path / "floor")
    refused(r"floor: a folder has the name of a column of the report", tmp_path / "floor", real, "--frames=9")
    (tmp_path / "fewer").mkdir()
    for number in range(2):
        shutil.copy(samples / "000.mp4", tmp_path / "fewer" / f"{number}.mp4")
    expected = "samples has 3, fewer has 2 clips; expected the same number in each folder"
    refused(expected, samples, tmp_path / "fewer", real, "--frames=9")


def test_everything_is_checked_before_a_clip_is_read(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "read_clip", lambda *_: pytest.fail("a clip was read"))
    shutil.copytree(folders / "samples", tmp_path / "more")
    shutil.copy(folders / "samples" / "000.mp4", tmp_path / "more" / "003.mp4")
    for message, arguments in (
        ("none: no such folder", [folders / "samples", tmp_path / "none"]),
        ("samples has 3, more has 4 clips", [folders / "samples", tmp_path / "more", folders / "real"]),
        ("3 mp4 files; expected at least 4", [folders / "samples", folders / "samples"]),
        ("3 captions; expected 4", [tmp_path / "more", folders / "real", f"--prompts={folders}/prompts.txt"]),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(*arguments)


# --- The source of the sizes -----------------------------------------------------------------------------------------


class FirstRead(Exception):
    """Raised instead of reading the first clip, with the requested frames, height, width and rate."""


@pytest.fixture
def requested_spec(folders, tmp_path, monkeypatch):
    """A function from options and the text of a configuration to the frames, height, width and rate that are read."""

    def read_clip(path, *spec):
        raise FirstRead(spec)

    def read(*options: str, config: str) -> tuple:
        (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
        with pytest.raises(FirstRead) as caught:
            evaluate(folders / "samples", folders / "real", f"--config={tmp_path}/config.yaml", *options)
        return caught.value.args[0]

    monkeypatch.setattr(video, "read_clip", read_clip)
    return read


CLIP = "clip: {frames: 9, height: 32, width: 48, fps: 8}\n"


def test_sizes_of_a_configuration(requested_spec):
    assert requested_spec(config=CLIP) == (9, 32, 48, 8)
    assert requested_spec(config=f"lora: {{rank: 4}}\n{CLIP}") == (9, 32, 48, 8)
    assert requested_spec("--fps=16", "--frames=5", config=CLIP) == (5, 32, 48, 16)


def test_a_configuration_without_a_clip(requested_spec, folders):
    with pytest.raises(InputError, match=r"config.yaml: clip is missing; expected it in the file"):
        requested_spec(config="lora: {rank: 4}\n")
    with pytest.raises(InputError, match=r"config.yaml: clip.frames=1: expected 5 to 1000"):
        requested_spec(config=CLIP.replace("frames: 9", "frames: 1"))
    with pytest.raises(InputError, match=r"none.yaml: no such file"):
        evaluate(folders / "samples", folders / "real", "--config=none.yaml")


def test_bad_input_ends_with_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tfm-evaluate", str(tmp_path / "none"), f"--reference={tmp_path}"])
    with pytest.raises(SystemExit) as done:
        command.run(partial(execute, "evaluate"))
    assert done.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none: no such folder; expected a folder of mp4 files\n"
