"""What a sampling run checks before it loads a network, and the names and fingerprints of its files."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from helpers.sampling_runs import SIZE, run_of

from tfm_jax.config import SamplingConfig, load
from tfm_jax.errors import InputError, StoppedEarly
from tfm_jax.files import fingerprint as file_fingerprint
from tfm_jax.lora.combining import parse_choice
from tfm_jax.moving_shapes.pretraining.network import initialise
from tfm_jax.sampling import outputs, pipeline, writing
from tfm_jax.sampling.outputs import Samples, fingerprint_loras, fingerprint_weights
from tfm_jax.sampling.pipeline import SampleRun, sample
from tfm_jax.wan.components import TEXT_ENCODER
from tfm_jax.wan.saving import save_model
from tfm_jax.wan.sources import source_from_module
from tfm_jax.wan.text_encoder import TextEncoderConfig


def test_a_missing_tokenizer_is_refused_before_any_network_is_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "load_vae", None)
    copy = shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(InputError, match="no tokenizer; expected"):
        sample(run_of(copy, tmp_path / "out"))


def test_networks_that_do_not_fit_together_are_refused(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(copy / "text_encoder")
    config = TextEncoderConfig(vocab_size=256, dim=32, heads=2, head_dim=16, ffn_dim=64, layers=1)
    encoder = source_from_module(initialise(TEXT_ENCODER, config, 0), TEXT_ENCODER)
    save_model([encoder], None, tmp_path / "other", "diffusers", jnp.float32)
    shutil.move(tmp_path / "other" / "text_encoder", copy / "text_encoder")
    with pytest.raises(InputError, match="the text encoder has width 32, but the transformer takes 64"):
        sample(run_of(copy, tmp_path / "out"))


@pytest.mark.parametrize("guidance", ["1e38", "1001", "inf", "nan", "-1"])
def test_absurd_guidance_is_refused(guidance):
    with pytest.raises(InputError, match=rf"--sampling\.guidance={guidance}: expected"):
        load(SampleRun, "wan_tiny", {"sampling.guidance": guidance})


def test_a_signal_before_the_first_step_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "load_vae", interrupt)
    with pytest.raises(StoppedEarly, match="0 of 3 videos are done"):
        sample(run_of(model, tmp_path / "new" / "out"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("output", ["", ".", "/", "file", "full"])
def test_impossible_output_folders(model, tmp_path, monkeypatch, rounds, output):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full", "000.mp4").write_text("mine")
    with pytest.raises(InputError, match=r"sampling\.output=.*expected"):
        sample(run_of(model, Path(output)))
    assert not rounds
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["000.mp4", "file", "full"]


def test_the_work_is_announced(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "_make", lambda *_: (_ for _ in ()).throw(InputError("enough")))
    with pytest.raises(InputError, match="enough"):
        sample(run_of(model, tmp_path / "out"))
    expected = f"3 prompts, 2 steps each, 16 frames a second; {model} (4 blocks of width 96, float32); devices: "
    assert capsys.readouterr().err.startswith(expected)


def test_names_of_many_videos_sort_by_number(model, tmp_path):
    samples = Samples(run=run_of(model, tmp_path), prompts=["x"] * 1001, weights="", lora=None)
    names = [samples.video(number).name for number in (0, 101, 1000)]
    assert names == ["0000.mp4", "0101.mp4", "1000.mp4"]


def test_fingerprints_of_weights(tmp_path, monkeypatch):
    """Small files are read completely; of large ones, the size and chunks from the first to the last byte."""
    monkeypatch.setattr(outputs, "NUM_CHUNKS", 4)
    monkeypatch.setattr(outputs, "CHUNK_BYTES", 10)
    file = tmp_path / "weights"

    def fingerprint(data: bytes) -> str:
        file.write_bytes(data)
        return fingerprint_weights([file])

    for size, noticed in ((40, range(40)), (37, range(37)), (400, [0, 9, 130, 139, 260, 390, 399])):
        whole = bytes(size)
        changed = [whole[:n] + b"x" + whole[n + 1 :] for n in noticed]
        assert len({fingerprint(data) for data in [whole, *changed, whole + b"\0"]}) == len(changed) + 2


def test_fingerprints_of_loras(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text(file.name)
    a, b = ([parse_choice(file)] for file in files)
    half = [parse_choice(f"{files[0]}:0.5")]
    found = [fingerprint_loras(choices) for choices in ([], a, b, half, a + b, b + a, half + b)]
    assert found[0] is None
    assert found[1] == file_fingerprint(files[0])
    assert len(set(found)) == len(found)


def test_the_configuration_of_a_training_run_is_accepted(model, tmp_path):
    sections = {
        "model": {"path": str(model), **SIZE},
        "clip": {"frames": 5, "height": 32, "width": 48},
        "data": {"path": "latents"},
        "train": {"output": "run", "steps": 2},
        "lora": {"rank": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    run = load(SampleRun, tmp_path / "config.yaml", {"sampling.output": "samples"})
    assert run.sampling == SamplingConfig(output=Path("samples"))
    assert dataclasses.asdict(run.clip)["frames"] == 5
