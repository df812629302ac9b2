"""Preparing clips: which are kept, which are rejected, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.records import make_records
from PIL import Image

from tfm_jax import video
from tfm_jax.config import ClipConfig, DataConfig, ModelConfig
from tfm_jax.data import prepare as prepare_module
from tfm_jax.data.prepare import Prepared, PrepareRun, prepare
from tfm_jax.data.records import Record, open_records
from tfm_jax.errors import InputError


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    """Five clips of 5 frames, and a fake encoder that needs no model."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(5):
        video.write_clip(folder / f"{n}.mp4", rng.integers(0, 255, (5, 16, 16, 3), np.uint8), 16)
    (folder / "metadata.csv").write_text("video,prompt\n" + "".join(f"{n}.mp4,prompt {n}\n" for n in range(5)))
    latents, text = make_records(1)[0][:2]

    def encoder(model):
        return lambda row, pixels: Record(latents + pixels.mean(dtype=np.float32), text, row.prompt, row.video)

    monkeypatch.setattr(prepare_module, "_encoder", encoder)
    return folder


def prepare_run(clips: Path, path: Path | None = None) -> PrepareRun:
    return PrepareRun(
        model=ModelConfig(path=Path("weights"), dim=96, ffn_dim=256, heads=4, layers=4),
        clip=ClipConfig(frames=5, height=16, width=16),
        data=DataConfig(source=clips, path=clips.with_name("latents") if path is None else path),
    )


def test_bad_clips_are_rejected_and_the_others_are_kept(clips, capsys):
    (clips / "2.mp4").write_bytes(b"not a video")
    video.write_clip(clips / "4.mp4", np.zeros((3, 16, 16, 3), np.uint8), 16)
    run = prepare_run(clips)
    assert prepare(run) == Prepared(written=3, rejected=2)
    records = open_records(run.data.path)
    assert [records[n].video for n in range(len(records))] == ["0.mp4", "1.mp4", "3.mp4"]
    rejected = [json.loads(line) for line in (run.data.path / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["video"]) for entry in rejected] == [(4, "2.mp4"), (6, "4.mp4")]
    assert f"{clips}/2.mp4: is damaged or not a video" in rejected[0]["reason"]
    assert "expected enough for 5 frames" in rejected[1]["reason"]
    said = capsys.readouterr().err
    assert (
        f"{clips}/metadata.csv (CSV): 5 clips, 5 frames of 16 x 16 pixels at 16 frames a second; model weights; 1 x cpu"
        in said
    )
    assert f"rejected: {clips}/2.mp4: is damaged" in said
    assert len(tfds.builder_from_directory(run.data.path).as_data_source(split="train")) == 3


@pytest.mark.parametrize(
    ("name", "origin"), [("metadata.json", {"index": 2}), ("metadata.jsonl", {"line": 3}), ("pairs", {"file": "2.txt"})]
)
def test_rejected_clips_of_other_lists(clips, capsys, name, origin):
    (clips / "metadata.csv").unlink()
    (clips / "2.mp4").write_bytes(b"not a video")
    rows = [{"video": f"{n}.mp4", "prompt": f"prompt {n}"} for n in range(5)]
    if name == "pairs":
        for n in range(5):
            (clips / f"{n}.txt").write_text(f"prompt {n}\n")
    else:
        (clips / name).write_text(json.dumps(rows) if name == "metadata.json" else "\n".join(map(json.dumps, rows)))
    run = prepare_run(clips)
    assert prepare(run) == (4, 1)
    records = open_records(run.data.path)
    assert [records[n].prompt for n in range(4)] == [f"prompt {n}" for n in (0, 1, 3, 4)]
    [rejected] = map(json.loads, (run.data.path / "rejected.jsonl").read_text().splitlines())
    assert rejected.items() >= {**origin, "video": "2.mp4"}.items()
    assert len(rejected) == 3
    kinds = {"metadata.json": "metadata.json (JSON)", "metadata.jsonl": "metadata.jsonl (JSONL)"}
    listed = f"{clips}/{kinds[name]}" if name in kinds else f"{clips} (pairs of clip and text file)"
    assert f"{listed}: 5 clips, 5 frames" in capsys.readouterr().err


def test_images(clips):
    """They are rejected among videos, and accepted where a clip has one frame."""
    Image.new("RGB", (16, 16), "red").save(clips / "5.png")
    with (clips / "metadata.csv").open("a") as table:
        table.write("5.png,red\n")
    run = prepare_run(clips)
    assert prepare(run) == (5, 1)
    reason = "5.png: is an image, which has one frame; expected 5"
    assert reason in (run.data.path / "rejected.jsonl").read_text()
    run = dataclasses.replace(
        prepare_run(clips, clips.with_name("images")), clip=ClipConfig(frames=1, height=16, width=16)
    )
    assert prepare(run) == (6, 0)


def test_a_clip_that_disappears_is_rejected(clips, monkeypatch):
    encoder = prepare_module._encoder

    def removing(model):
        encode = encoder(model)
        return lambda row, pixels: ((clips / "1.mp4").unlink(missing_ok=True), encode(row, pixels))[1]

    monkeypatch.setattr(prepare_module, "_encoder", removing)
    run = prepare_run(clips)
    assert prepare(run) == (4, 1)
    assert "1.mp4: no such file" in (run.data.path / "rejected.jsonl").read_text()


def test_no_clip_can_be_used(clips):
    for file in clips.glob("*.mp4"):
        file.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"latents: none of the 5 clips can be used; the first problem: .*clips/0.mp4: is damaged"
    ):
        prepare(prepare_run(clips))
    assert [path.name for path in clips.parent.iterdir()] == ["clips"]


def test_outputs_are_checked_before_the_model_is_loaded(clips, monkeypatch):
    monkeypatch.setattr(prepare_module, "_encoder", lambda model: pytest.fail("loaded"))
    for path, message in (
        (Path(""), "expected the path of a folder"),
        (Path("/"), "expected the path of a folder"),
        (clips, "already exists and is not empty"),
        (clips / "0.mp4", "is a file; expected a directory"),
    ):
        with pytest.raises(InputError, match=f"data.path={path}: {message}"):
            prepare(prepare_run(clips, path))
    (clips / "3.mp4").unlink()
    with pytest.raises(InputError, match=r"metadata.csv:5: video='3.mp4': no such file"):
        prepare(prepare_run(clips))
    assert [path.name for path in clips.parent.iterdir()] == ["clips"]


def test_an_encoder_that_gives_infinity_is_an_error_not_a_rejected_clip(clips, monkeypatch):
    record = make_records(1)[0]
    record.latents[0] = np.inf
    monkeypatch.setattr(prepare_module, "_encoder", lambda model: lambda row, pixels: record._replace(video=row.video))
    with pytest.raises(InputError, match=r"0.mp4: the latents or the text embedding are not finite"):
        prepare(prepare_run(clips))
    assert [path.name for path in clips.parent.iterdir()] == ["clips"]
