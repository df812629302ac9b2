"""Preparing clips: which are kept, which are rejected, and what is refused."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.clips import smooth_clip
from helpers.fake_encoders import CHANNELS, TEXT_DIM, FakeEncoders
from helpers.prepare_runs import beside, contents, never, prepare_run, with_clip, write_clips
from helpers.records import read_dataset
from PIL import Image
from safetensors.numpy import load_file

from tfm_jax import video
from tfm_jax.data import blocks as blocks_module
from tfm_jax.data import prepare as prepare_module
from tfm_jax.data import survey as survey_module
from tfm_jax.data.format import read_index, read_manifest
from tfm_jax.data.prepare import Prepared, PrepareRun, prepare
from tfm_jax.errors import InputError
from tfm_jax.files import lock
from tfm_jax.video_headers import read_header


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    return write_clips(tmp_path / "clips", monkeypatch)


def rejections(run: PrepareRun) -> list[dict]:
    return [json.loads(line) for line in (run.data.path / "rejected.jsonl").read_text().splitlines()]


# --- What is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder(clips, dtype):
    run = prepare_run(clips, dtype=dtype)
    assert prepare(run) == Prepared(5, 0)
    records = read_dataset(run.data.path)
    assert [(record.video, record.prompt) for record in records] == [(f"{n}.mp4", f"prompt {n}") for n in range(5)]
    for record in records:
        assert record.latents.shape == (2, 2, 2, CHANNELS)
        assert (record.latents.dtype.name, record.text.dtype.name) == (dtype, dtype)
        pixels = video.read_clip(clips / record.video, 5, 16, 16, 16)
        np.testing.assert_allclose(record.latents.astype(np.float32), pixels.mean(), rtol=0.01)
        assert record.text.shape == (9, TEXT_DIM)
    entries = read_index(run.data.path)
    assert [entry.video for entry in entries] == [f"{n}.mp4" for n in range(5)]
    assert {(entry.latents, entry.tokens) for entry in entries} == {((2, 2, 2, CHANNELS), 9)}
    assert [entry.fingerprint for entry in entries] == [record.fingerprint for record in records]
    manifest = read_manifest(run.data.path)
    assert manifest.encoders == {"vae": "0" * 16, "text_encoder": "1" * 16}
    assert (manifest.dtype, manifest.data_seed, manifest.model) == (dtype, 0, "weights")
    assert manifest.clip["frames"] == 5
    assert [shard.records for shard in manifest.shards] == [2, 2, 1]
    empty = load_file(run.data.path / "empty_prompt.safetensors")["text"]
    assert (empty.shape, empty.dtype.name) == ((1, TEXT_DIM), dtype)
    assert beside(clips) == ["latents"]
    others = {"dataset_info.json", "empty_prompt.safetensors", "features.json", "index.jsonl", "manifest.json"}
    assert {path.name for path in run.data.path.iterdir()} - {shard.file for shard in manifest.shards} == others


def test_bad_clips_are_rejected_and_the_others_are_kept(clips, capsys):
    (clips / "1.mp4").unlink()
    (clips / "2.mp4").write_bytes(b"not a video")
    run = prepare_run(clips)
    assert prepare(run) == Prepared(written=3, rejected=2)
    assert [record.video for record in read_dataset(run.data.path)] == ["0.mp4", "3.mp4", "4.mp4"]
    missing, damaged = rejections(run)
    assert missing == {"line": 3, "video": "1.mp4", "reason": "no such file; expected a video or image"}
    assert (damaged["line"], damaged["video"]) == (4, "2.mp4")
    assert damaged["reason"].startswith("is damaged or not a video")
    said = capsys.readouterr().err
    listed = f"{clips}/metadata.csv (CSV): 5 clips, 5 frames of 16 x 16 pixels at 16 frames a second"
    assert f"{listed}; model weights; 1 x cpu\n" in said
    assert "rejected: 2.mp4: is damaged" in said


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
    assert [record.prompt for record in read_dataset(run.data.path)] == [f"prompt {n}" for n in (0, 1, 3, 4)]
    [rejected] = rejections(run)
    assert rejected.items() >= {**origin, "video": "2.mp4"}.items()
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
    assert rejections(run)[0]["reason"] == "is an image, which has one frame; expected 5"
    assert prepare(with_clip(prepare_run(clips, clips.with_name("images")), frames=1)) == (6, 0)


def test_sizes_are_mixed(clips):
    """In every block, the clips of a size follow each other, and share the calls of the autoencoder."""
    for n in (0, 3):
        video.write_clip(clips / f"{n}.mp4", smooth_clip(5, 16, 32), 16)
    run = with_clip(prepare_run(clips), buckets=((5, 16, 16), (5, 16, 32)))
    assert prepare(run) == (5, 0)
    entries = read_index(run.data.path)
    assert [(entry.video, entry.latents[2]) for entry in entries] == [
        ("1.mp4", 2), ("0.mp4", 4), ("2.mp4", 2), ("3.mp4", 4), ("4.mp4", 2),
    ]  # fmt: skip
    assert FakeEncoders.calls == [1, 1, 1, 1, 1]


def test_a_call_encodes_a_clip_for_each_device(clips, monkeypatch):
    monkeypatch.setattr(blocks_module, "MAX_ROWS", 5)
    assert prepare(prepare_run(clips)) == (5, 0)
    assert FakeEncoders.calls == [2, 2, 1]


def test_windows_become_records_with_the_prompt_of_the_video(clips):
    video.write_clip(clips / "1.mp4", np.random.default_rng(1).integers(0, 255, (16, 16, 16, 3), np.uint8), 16)
    run = with_clip(prepare_run(clips), part="windows")
    assert prepare(run) == (7, 0)
    records = read_dataset(run.data.path)
    names = ["0.mp4", "1.mp4", "1.mp4#t=0.312", "1.mp4#t=0.625", "2.mp4", "3.mp4", "4.mp4"]
    assert [record.video for record in records] == names
    assert [record.prompt for record in records][1:4] == ["prompt 1"] * 3
    assert len({record.latents.tobytes() for record in records[1:4]}) > 1


def test_windows_before_a_damaged_place_are_kept(clips):
    video.write_clip(clips / "1.mp4", smooth_clip(40), 16)
    content = (clips / "1.mp4").read_bytes()
    (clips / "1.mp4").write_bytes(content[: int(0.8 * len(content))])
    run = with_clip(prepare_run(clips), part="windows")
    written, rejected = prepare(run)
    assert 5 < written < 4 + 8
    assert rejected == 1
    assert rejections(run)[0]["video"] == "1.mp4"
    assert rejections(run)[0]["reason"].startswith("is damaged")


def test_a_header_that_promises_too_much(clips, monkeypatch):
    """The clip is rejected when it is read."""
    video.write_clip(clips / "1.mp4", np.zeros((3, 16, 16, 3), np.uint8), 16)
    lie = read_header(clips / "0.mp4")
    monkeypatch.setattr(survey_module, "read_header", lambda path: lie)
    run = prepare_run(clips)
    assert prepare(run) == (4, 1)
    assert rejections(run)[0]["reason"].startswith("has 3 frames")


def test_native_frames(clips):
    for n in range(5):
        video.write_clip(clips / f"{n}.mp4", smooth_clip(5), 30)
    assert prepare(with_clip(prepare_run(clips), fps="native")) == (5, 0)


# --- What is refused -------------------------------------------------------------------------------------------------


def test_outputs_are_checked_before_the_model_is_loaded(clips, monkeypatch):
    monkeypatch.setattr(prepare_module, "Encoders", never)
    for path, message in (
        (Path("."), "expected the path of a folder"),
        (Path("/"), "expected the path of a folder"),
        (clips, "already exists and is not empty"),
        (clips / "0.mp4", "is a file; expected a directory"),
    ):
        with pytest.raises(InputError, match=f"data.path={path}: {message}"):
            prepare(prepare_run(clips, path))
    (clips / "metadata.csv").write_text("video,prompt\n../3.mp4,a\n")
    with pytest.raises(InputError, match=r"metadata.csv:2: video='../3.mp4': is outside the folder"):
        prepare(prepare_run(clips))
    assert beside(clips) == []


def test_a_link_to_an_empty_folder(clips, tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
    assert prepare(prepare_run(clips, tmp_path / "link")) == (5, 0)
    assert (tmp_path / "link").is_symlink()
    assert len(read_index(tmp_path / "disk" / "empty")) == 5


def test_a_mount_point(clips, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(blocks_module.os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    with pytest.raises(InputError, match=r"disk: is a mount point; use a folder inside it, such as .*disk/latents"):
        prepare(prepare_run(clips, tmp_path / "disk"))


def test_two_runs(clips):
    with lock(clips.with_name("latents.partial") / "lock") as held:
        assert held
        with pytest.raises(InputError, match="latents: is in use by another run"):
            prepare(prepare_run(clips))


def test_a_partial_folder_of_somebody_else_is_kept(clips):
    partial = clips.with_name("latents.partial")
    partial.mkdir()
    (partial / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"latents.partial: was not made by this version of tfm-prepare"):
        prepare(prepare_run(clips))
    assert [path.name for path in partial.iterdir()] == ["thesis.txt"]


def test_a_short_video_is_refused_before_the_model_is_loaded(clips, monkeypatch):
    monkeypatch.setattr(prepare_module, "Encoders", never)
    video.write_clip(clips / "4.mp4", np.zeros((3, 16, 16, 3), np.uint8), 16)
    message = r"clip.short=refuse: 1 of 5 clips are too short; the first one: .*/4.mp4: has 3 frames and lasts 0.19 s"
    with pytest.raises(InputError, match=message):
        prepare(with_clip(prepare_run(clips), short="refuse"))
    assert beside(clips) == []


def test_values_that_are_not_finite_are_an_error_not_a_rejected_clip(clips, monkeypatch):
    monkeypatch.setattr(FakeEncoders, "latents", lambda self, clips: jnp.full((2, 2, 2, 2, CHANNELS), jnp.inf))
    with pytest.raises(InputError, match=r"0.mp4: the latents or the text embedding are not finite; check the weights"):
        prepare(prepare_run(clips))
    assert beside(clips) == []


# --- Too many rejected clips -----------------------------------------------------------------------------------------


def test_too_many_bad_headers(clips, monkeypatch):
    """This is found before the model is loaded, and leaves nothing behind."""
    monkeypatch.setattr(prepare_module, "Encoders", never)
    (clips / "1.mp4").unlink()
    for n, frames in ((2, 3), (4, 4)):
        video.write_clip(clips / f"{n}.mp4", np.zeros((frames, 16, 16, 3), np.uint8), 16)
    with pytest.raises(InputError) as caught:
        prepare(prepare_run(clips, max_rejected=0.5))
    assert str(caught.value) == (
        "data.max_rejected=0.5: 3 of the 5 videos cannot be used: 2 like 2.mp4: has 3 frames and lasts 0.19 s; "
        "expected enough for 5 frames at 16 frames a second; 1 like 1.mp4: no such file; expected a video or image"
    )
    assert beside(clips) == []


def test_too_many_damaged_clips_stop_the_run_and_the_blocks_stay(clips):
    for n in (1, 3):
        content = (clips / f"{n}.mp4").read_bytes()
        (clips / f"{n}.mp4").write_bytes(content[: len(content) // 2])
    run = prepare_run(clips, max_rejected=0.2)
    with pytest.raises(InputError, match=r"data.max_rejected=0.2: 2 of the 5 videos cannot be used: 2 like 1.mp4: "):
        prepare(run)
    assert {"block-00000.json", "block-00001.json", "plan.json"} <= contents(clips.with_name("latents.partial")).keys()
    assert prepare(prepare_run(clips, max_rejected=0.4)) == (3, 2)
    assert len(FakeEncoders.calls) == 1


def test_the_limit_itself_is_allowed(clips):
    (clips / "1.mp4").unlink()
    assert prepare(prepare_run(clips, max_rejected=0.2)) == (4, 1)
    with pytest.raises(InputError, match=r"data.max_rejected=0.19"):
        prepare(prepare_run(clips, clips.with_name("other"), max_rejected=0.19))


def test_no_clip_can_be_used(clips):
    for file in clips.glob("*.mp4"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"clips: none of the 5 videos can be used: 5 like 0.mp4: is damaged"):
        prepare(prepare_run(clips, max_rejected=1))
    assert beside(clips) == []
