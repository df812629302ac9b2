"""A sampling run: its files, the same bytes after every interruption, and the inputs it refuses."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.lora_files import official_file
from helpers.sampling_runs import LATENTS, PROMPTS, SIZE, VIDEOS, content, damage, run_of

from tfm_jax import files, interrupts, video
from tfm_jax.cli import command
from tfm_jax.config import load
from tfm_jax.errors import InputError
from tfm_jax.lora.files import Adapter, Lora, write_lora
from tfm_jax.sampling import pipeline, writing
from tfm_jax.sampling.comparing import compare
from tfm_jax.sampling.latents import draw_noise, write_latents
from tfm_jax.sampling.pipeline import SampleRun, sample
from tfm_jax.wan.names import BlockLinear


def test_the_files_of_a_run(finished):
    others = [".lock", "config.yaml", "contact_sheet.png", "samples.json"]
    assert sorted(content(finished)) == sorted([*VIDEOS, *LATENTS, *others])
    assert load(SampleRun, finished / "config.yaml").sampling.output == finished
    clips = [video.read_clip(finished / name, 5, 32, 48, 16) for name in VIDEOS]
    assert (clips[0] != clips[1]).any()


def test_the_same_command_makes_what_is_missing(finished, model, tmp_path, rounds):
    """It writes the same bytes as an uninterrupted run, and leaves existing files alone."""
    run = run_of(model, tmp_path / "out")
    shutil.copytree(finished, tmp_path / "out")
    for name in ("001.mp4", "001.safetensors", "contact_sheet.png"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / ".001.mp4.partial").write_text("half a video")
    before = (tmp_path / "out" / "000.mp4").stat().st_mtime_ns
    sample(run)
    assert content(tmp_path / "out") == content(finished)
    assert len(rounds) == 1
    assert (tmp_path / "out" / "000.mp4").stat().st_mtime_ns == before


def test_saved_latents_are_only_decoded(finished, model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "embed", None)
    shutil.copytree(finished, tmp_path / "out")
    for name in VIDEOS[:2]:
        (tmp_path / "out" / name).unlink()
    sample(run_of(model, tmp_path / "out"))
    assert content(tmp_path / "out") == content(finished)


def test_a_missing_contact_sheet_is_made_without_the_model(finished, model, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "load_vae", None)
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "contact_sheet.png").unlink()
    sample(run_of(model, tmp_path / "out"))
    assert content(tmp_path / "out") == content(finished)


def test_a_complete_run_is_reported(finished, model, monkeypatch, capsys):
    """Also when the model has been moved."""
    monkeypatch.setattr(writing, "load_vae", None)
    moved = shutil.copytree(model, model.parent / "moved" / "model")
    sample(run_of(moved, finished))
    assert capsys.readouterr().out == f"{finished}: already contains all 3 videos\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, r"sampling\.seed=4: .* made with 0"),
        ({"steps": 3}, r"sampling\.steps=3: .* made with 2"),
        ({"guidance": 4.0}, r"sampling\.guidance=4\.0: .* made with 5\.0"),
        ({"negative_prompt": "rain"}, r"sampling\.negative_prompt=rain: "),
        ({"prompts": PROMPTS[:2]}, r"sampling\.prompts=.*made with 3 prompts, not 2"),
        ({"prompts": [*PROMPTS[:2], "x"]}, r"sampling\.prompts=.* were made with prompt 2 '一个蓝色的圆 🔵'"),
        ({"lora": "new"}, r"sampling\.lora=.* made with another LoRA"),
        ({"model": "new"}, r"model\.path=.* made with other weights"),
    ],
)
def test_the_folder_of_a_different_run_is_refused(finished, model, tmp_path, rounds, change, words):
    if "prompts" in change:
        (tmp_path / "prompts.txt").write_text("\n".join(change["prompts"]), encoding="utf-8")
        change = {"prompts": tmp_path / "prompts.txt"}
    if "lora" in change:
        change = {"lora": write_adapters(tmp_path / "lora.safetensors")}
    if change.pop("model", None):
        model = shutil.copytree(model, tmp_path / "model")
        damage(model / "transformer", lambda tensors: tensors["proj_out.bias"].fill(1))
    before = content(finished)
    with pytest.raises(InputError, match=rf"{words}.*another sampling\.output"):
        sample(run_of(model, finished, **change))
    assert content(finished) == before
    assert not rounds


def write_adapters(path: Path) -> Path:
    adapter = Adapter(np.ones((2, 96), "f4"), np.ones((96, 2), "f4"))
    adapters = {BlockLinear(layer, "self_attn.q"): adapter for layer in range(4)}
    write_lora(path, Lora(adapters, 2, 2.0))
    return path


def widen(tensors: dict) -> None:
    tensors["post_quant_conv.bias"] = np.zeros(17, np.float32)


@pytest.mark.parametrize(
    ("component", "change", "words"),
    [
        ("vae", lambda tensors: tensors["decoder.conv_out.bias"].fill(np.nan), "NaN or infinite"),
        ("vae", lambda tensors: tensors.pop("decoder.conv_out.bias"), "1 of .* tensors are missing"),
        ("vae", widen, r"post_quant_conv\.bias has shape \[17\]; expected \[16\]"),
        ("vae", lambda tensors: tensors["decoder.conv_in.weight"].fill(3e38), "pixels that are not finite"),
        ("text_encoder", lambda tensors: tensors.pop("shared.weight"), "1 of .* tensors are missing"),
        ("transformer", lambda tensors: tensors["proj_out.bias"].fill(np.inf), "NaN or infinite"),
        ("transformer", lambda tensors: tensors["proj_out.weight"].fill(3e38), "video 0: the latents are not finite"),
    ],
)
def test_a_bad_network_is_refused_before_sampling(model, tmp_path, rounds, component, change, words):
    copy = shutil.copytree(model, tmp_path / "model")
    damage(copy / component, change)
    with pytest.raises(InputError, match=words):
        sample(run_of(copy, tmp_path / "new" / "out"))
    assert not rounds
    assert not (tmp_path / "new").exists()


def test_a_video_that_is_not_finite_is_not_written_and_the_others_stay(finished, model, tmp_path, monkeypatch, rounds):
    whole = pipeline.sample_latents

    def overflow(*arguments, **options):
        latents = whole(*arguments, **options)
        return latents * jnp.nan if len(rounds) == 2 else latents

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sample_latents", overflow)
        with pytest.raises(InputError, match="video 1: the latents are not finite"):
            sample(run_of(model, tmp_path / "out"))
    assert sorted(content(tmp_path / "out")) == [
        ".lock", "000.mp4", "000.safetensors", "config.yaml", "samples.json",
    ]  # fmt: skip
    sample(run_of(model, tmp_path / "out"))
    assert content(tmp_path / "out") == content(finished)


def test_a_full_disk_keeps_the_finished_videos(finished, model, tmp_path, monkeypatch):
    write = video.write_clip

    def full(path, *arguments):
        if path.name == "001.mp4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(video, "write_clip", full)
        with pytest.raises(OSError, match="No space left"):
            sample(run_of(model, tmp_path / "out"))
    assert sorted(content(tmp_path / "out")) == [
        ".lock", "000.mp4", "000.safetensors", "001.safetensors", "config.yaml", "samples.json",
    ]  # fmt: skip
    sample(run_of(model, tmp_path / "out"))
    assert content(tmp_path / "out") == content(finished)


def test_a_signal_stops_after_the_step_and_the_same_command_continues(
    finished, model, tmp_path, monkeypatch, capfd, rounds
):
    run = run_of(model, tmp_path / "out")
    write = video.write_clip

    def send(*arguments):
        write(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        while not interrupts.requested():
            time.sleep(0.001)

    with monkeypatch.context() as patch:
        patch.setattr(video, "write_clip", send)
        patch.setattr(sys, "argv", ["tfm-sample"])
        with pytest.raises(SystemExit) as ended:
            command.run(lambda _: sample(run))
    assert ended.value.code == 75
    assert len(rounds) == 2
    err = capfd.readouterr().err
    assert "SIGTERM: stopping after this step; send it again to end the program at once" in err
    assert err.splitlines()[-1] == "stopped: 1 of 3 videos are done; to continue, run the same command again"
    sample(run)
    assert len(rounds) == 2 + 2
    assert content(tmp_path / "out") == content(finished)


def test_a_folder_that_another_process_writes_to_is_refused(finished, model, tmp_path, rounds):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "001.mp4").unlink()
    with (
        files.lock(tmp_path / "out" / ".lock"),
        pytest.raises(InputError, match=r"sampling\.output=.*another process"),
    ):
        sample(run_of(model, tmp_path / "out"))
    assert not rounds


def test_a_damaged_samples_json_is_refused(finished, model, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    for text in ("", "{}", '{"run": 1'):
        (tmp_path / "out" / "samples.json").write_text(text)
        with pytest.raises(InputError, match=r"samples\.json: is damaged"):
            sample(run_of(model, tmp_path / "out"))


def test_a_field_that_samples_json_lacks_has_its_default(finished, model, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    record = tmp_path / "out" / "samples.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"guidance": 5.0,', ""), encoding="utf-8")
    sample(run_of(model, tmp_path / "out"))


def test_noise_is_a_function_of_seed_and_number(model, tmp_path, rounds):
    """The other prompts do not change the noise of prompt number n."""

    def start(name: str, prompts: list[str], seed: int) -> list[np.ndarray]:
        rounds.clear()
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
        sample(run_of(model, tmp_path / name, prompts=tmp_path / f"{name}.txt", seed=seed))
        return list(rounds)

    three, two, other = start("a", ["x", "y", "z"], 3), start("b", ["w", "y"], 3), start("c", ["x", "y"], 4)
    assert [noise.shape for noise in three] == [(1, 2, 4, 6, 16)] * 3
    np.testing.assert_array_equal(three[:2], two)
    different = [*three, *other]
    assert len({noise.tobytes() for noise in different}) == len(different)
    assert np.std(three[0]) == pytest.approx(1, abs=0.1)


def test_shared_noise_and_several_videos_per_prompt(model, tmp_path, rounds):
    """Video n of a prompt has the noise of seed + n; shared noise is that of the first prompt."""
    several = run_of(model, tmp_path / "a", prompts=write_prompts(tmp_path / "p", "x", "y"), videos_per_prompt=2)
    samples = sample(several)
    names = ["000_0.mp4", "000_1.mp4", "001_0.mp4", "001_1.mp4"]
    assert sorted(path.name for path in (tmp_path / "a").glob("*.mp4")) == names
    assert [samples.prompt(number) for number in range(4)] == ["x", "x", "y", "y"]
    own = {key: draw_noise(several.sampling, *key, rounds[0].shape[1:]) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    np.testing.assert_array_equal(np.concatenate(rounds), np.stack([*own.values()]))
    next_seed = dataclasses.replace(several.sampling, seed=1)
    np.testing.assert_array_equal(own[1, 1], draw_noise(next_seed, 1, 0, rounds[0].shape[1:]))
    shared = dataclasses.replace(several.sampling, noise="shared")
    np.testing.assert_array_equal(own[0, 1], draw_noise(shared, 1, 1, rounds[0].shape[1:]))


def write_prompts(file: Path, *prompts: str) -> Path:
    file.write_text("\n".join(prompts), encoding="utf-8")
    return file


def test_given_noise(finished, model, tmp_path, rounds):
    """The noise of a run, given as a file, makes the same videos, but in a folder of its own."""
    run = run_of(model, tmp_path / "out", latents=tmp_path / "noise.safetensors")
    noise = np.stack([draw_noise(run.sampling, n, 0, (2, 4, 6, 16)) for n in range(3)])
    write_latents(run.sampling.latents, noise)
    sample(run)
    np.testing.assert_array_equal(np.concatenate(rounds), noise)
    assert [content(tmp_path / "out")[name] for name in LATENTS] == [content(finished)[name] for name in LATENTS]
    write_latents(run.sampling.latents, noise + 1)
    with pytest.raises(InputError, match=r"sampling\.latents=.*made from other latents; .*another sampling\.output"):
        sample(run)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((2, 2, 4, 6, 16)), r"noise of 2 videos; expected one, or 3"),
        (np.zeros((3, 2, 4, 5, 16)), r"shape \[3, 16, 2, 4, 5\]; expected one tensor latents, \[videos, 16, 2, 4, 6\]"),
        (np.full((1, 2, 4, 6, 16), np.nan), "NaN"),
    ],
)
def test_noise_that_does_not_fit_is_refused(model, tmp_path, rounds, values, words):
    write_latents(tmp_path / "noise", np.float32(values))
    with pytest.raises(InputError, match=rf"sampling\.latents={tmp_path}/noise: .*{words}"):
        sample(run_of(model, tmp_path / "out", latents=tmp_path / "noise"))
    assert not rounds


def test_the_settings_are_in_the_metadata(finished):
    with av.open(finished / "001.mp4") as container:
        title, comment = container.metadata["title"], json.loads(container.metadata["comment"])
    assert title == comment["prompt"] == PROMPTS[1]
    assert comment["sampling.steps"] == 2
    assert comment["sampling.solver"] == "euler"
    assert "sampling.output" not in comment


def test_base_and_lora_side_by_side(model, tmp_path):
    """The LoRA has the keys and dtypes of the TFM release."""
    lora = official_file(tmp_path / "tfm-lora.safetensors", SIZE["layers"], SIZE["dim"], SIZE["ffn_dim"])
    run = run_of(model, tmp_path / "out", lora=lora, prompts=write_prompts(tmp_path / "p", "x"))
    compare(run)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000.mp4", "base", "lora"]
    pair = video.read_clip(tmp_path / "out" / "000.mp4", 5, 24 + 32, 2 * 48, 16)[:, 24:]
    left, right = np.float32(pair[:, :, :48]), np.float32(pair[:, :, 48:])
    base, lora = (video.read_clip(tmp_path / "out" / name / "000.mp4", 5, 32, 48, 16) for name in ("base", "lora"))
    assert np.abs(left - base).mean() < np.abs(left - lora).mean()
    assert np.abs(right - lora).mean() < np.abs(right - base).mean()
    latents = [(tmp_path / "out" / name / "000.safetensors").read_bytes() for name in ("base", "lora")]
    assert latents[0] != latents[1]
    before = content(tmp_path / "out" / "lora")
    compare(run)
    assert content(tmp_path / "out" / "lora") == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"contains notes\.txt"):
        compare(run)


def test_rounds_do_not_depend_on_what_is_missing():
    assert pipeline.make_rounds(5, 2, {0, 1, 2, 3, 4}) == [[0, 1], [2, 3], [4, 4]]
    assert pipeline.make_rounds(5, 2, {3}) == [[2, 3]]
    assert pipeline.make_rounds(5, 2, {1, 4}) == [[0, 1], [4, 4]]
    assert pipeline.make_rounds(2, 4, {1}) == [[0, 1, 1, 1]]
