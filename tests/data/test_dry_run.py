"""The dry run of tfm-prepare: its table, its summary, and that it encodes nothing."""

import csv
import dataclasses
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from helpers.clips import encode, grey_clip, smooth_clip
from PIL import Image

from tfm_jax.config import ClipConfig, DataConfig, ModelConfig
from tfm_jax.data import dry_run as module
from tfm_jax.data.dry_run import dry_run
from tfm_jax.data.prepare import PrepareRun
from tfm_jax.errors import InputError

CLIP = ClipConfig(frames=17, height=64, width=64, buckets=((17, 64, 96), (9, 64, 96), (17, 96, 64)), part="windows")


@pytest.fixture
def clips(tmp_path) -> Path:
    """Seven files: two that are wide and long, a turned one, a short one, a damaged one, an image, a damaged image."""
    folder = tmp_path / "clips"
    folder.mkdir()
    encode(folder / "a, long.mp4", smooth_clip(40))
    encode(folder / "b.mkv", smooth_clip(17), container="matroska")
    encode(folder / "c.mp4", smooth_clip(17), rotation=90)
    encode(folder / "d.mp4", smooth_clip(12))
    encode(folder / "e.mp4", grey_clip(3))
    (folder / "f.mp4").write_bytes(b"not a video")
    Image.fromarray(smooth_clip(1)[0]).save(folder / "g.png")
    names = ["a, long.mp4", "b.mkv", "c.mp4", "d.mp4", "e.mp4", "f.mp4", "g.png"]
    rows = "".join(f'"{name}",prompt\n' for name in names)
    (folder / "metadata.csv").write_text(f"video,prompt\n{rows}")
    return folder


def run(clips: Path, clip: ClipConfig = CLIP) -> PrepareRun:
    model = ModelConfig(path=Path("weights"), dim=96, ffn_dim=256, heads=4, layers=4)
    return PrepareRun(model=model, clip=clip, data=DataConfig(source=clips, path=clips.with_name("latents")))


def test_the_table(clips):
    dry_run(run(clips))
    with open(clips.with_name("latents.report.csv"), newline="") as stream:
        found = list(csv.DictReader(stream))
    assert sorted(path.name for path in clips.parent.iterdir()) == ["clips", "latents.report.csv"]
    about = [[*row.values()] for row in found]
    assert about[0] == ["a, long.mp4", "40", "16", "2.500", "2.125", "0.375", "2", "17 x 64 x 96", ""]
    assert about[1] == ["b.mkv", "17", "16", "1.063", "1.062", "0.001", "1", "17 x 64 x 96", ""]
    assert about[2] == ["c.mp4", "17", "16", "1.062", "1.062", "0.000", "1", "17 x 96 x 64", ""]
    assert about[3] == ["d.mp4", "12", "16", "0.750", "0.562", "0.188", "1", "9 x 64 x 96", ""]
    assert about[4][:8] == ["e.mp4", "3", "16", "0.187", "0.000", "0.187", "0", ""]
    assert about[4][8].startswith("has 3 frames and lasts 0.19 s; expected enough for 9 frames")
    assert about[5][:8] == ["f.mp4", "", "", "", "0.000", "", "0", ""]
    assert about[5][8].startswith("is damaged or not a video")
    assert about[6][:8] == ["g.png", "1", "", "0.000", "0.000", "0.000", "0", ""]
    assert about[6][8] == "is an image, which has one frame; expected 9"


def test_the_summary(clips, capsys):
    dry_run(run(clips))
    said = capsys.readouterr()
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    found = [" ".join(line.split()[:9]) for line in lines[1:5]]
    per_frame, text = 8 * 12 * 16 * 2, 512 * 4096 * 2
    assert found == [
        f"17 x 64 x 96 3 3 0 {3 * 5 * per_frame / 1000:.1f}",
        f"9 x 64 x 96 1 1 0 {3 * per_frame / 1000:.1f}",
        f"17 x 96 x 64 1 1 0 {5 * per_frame / 1000:.1f}",
        f"all 5 5 1 {23 * per_frame / 1000:.1f} kB {5 * text / 1e6:.1f} MB",
    ]
    assert f"disk: at most {(23 * per_frame + 5 * text) / 1e6:.1f} MB; " in said.out
    assert "5 16" in lines
    assert "1 image" in lines
    assert "3 of 7 files, 0 seconds, are left out:" in lines
    assert "2 too short" in lines
    assert "to encode: 5 seconds of video, in 5 calls of the autoencoder" in lines
    problem = "data.max_rejected=0.05: 3 of the 7 videos cannot be used: 1 like e.mp4: has 3 frames"
    assert f"note: without --dry-run this is an error: {problem}" in said.out
    assert f"{clips.parent}/latents.report.csv: a line for each of the 7 files" in lines
    assert "reading headers" in said.err


def test_float32_takes_twice_the_space(clips, capsys):
    whole = run(clips)
    dry_run(dataclasses.replace(whole, data=dataclasses.replace(whole.data, dtype="float32", max_rejected=0.5)))
    said = capsys.readouterr().out
    assert f"disk: at most {(23 * 8 * 12 * 16 * 4 + 5 * 512 * 4096 * 4) / 1e6:.1f} MB; " in said
    assert "this is an error" not in said


def test_a_disk_that_is_too_small(clips, capsys, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 100))
    dry_run(run(clips))
    assert "disk: at most 21.0 MB; 100 B are free, which is too little" in capsys.readouterr().out


def test_short_videos_are_refused_after_the_report(clips, capsys):
    with pytest.raises(InputError, match=r"clip.short=refuse: 2 of 7 clips are too short; the first one: .*e.mp4"):
        dry_run(run(clips, ClipConfig(frames=9, height=64, width=96, short="refuse")))
    assert "2 too short" in " ".join(capsys.readouterr().out.split())
    assert clips.with_name("latents.report.csv").exists()


def test_no_clip_can_be_used(clips, capsys):
    dry_run(run(clips, ClipConfig(frames=81, height=64, width=96)))
    assert "7 of the 7 videos cannot be used" in capsys.readouterr().out


def test_rates_and_sizes():
    assert [module._rate(rate) for rate in (None, Fraction(30000, 1001), Fraction(25))] == [
        "", "29.97", "25",
    ]  # fmt: skip
    assert [module._size(count) for count in (0, 999, 1000, 1_234_567, 2 * 10**15)] == [
        "0 B", "999 B", "1.0 kB", "1.2 MB", "2,000.0 TB",
    ]  # fmt: skip
