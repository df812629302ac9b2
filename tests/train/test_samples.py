"""Samples during training: they equal those of tfm-sample, and an interruption leaves nothing half-written."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.configured import configured
from helpers.random_model import TEXT_DIM, write_model
from helpers.records import write_dataset
from helpers.training_runs import start

from tfm_jax import interrupts
from tfm_jax.data.format import Record
from tfm_jax.errors import InputError
from tfm_jax.sampling.outputs import SampleRun
from tfm_jax.sampling.pipeline import sample
from tfm_jax.sharding import one_device_mesh
from tfm_jax.train import samples
from tfm_jax.train.export import export
from tfm_jax.train.run import TrainRun
from tfm_jax.train.samples import SampleVideos
from tfm_jax.train.watching import About
from tfm_jax.video import read_clip
from tfm_jax.wan.components import TEXT_ENCODER, VAE
from tfm_jax.wan.fingerprint import fingerprint
from tfm_jax.wan.transformer import WanTransformer

PROMPTS = ["a red disc moves right", "a blue square"]
CLIP = {"frames": 5, "height": 32, "width": 48, "fps": 8.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, two clips, two prompts and the configuration of a run of one step."""
    folder = tmp_path_factory.mktemp("samples")
    write_model(folder / "model", PROMPTS)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    rng = np.random.default_rng(0)
    shapes = (2, 4, 6, 16), (3, TEXT_DIM)
    records = [Record(*(rng.standard_normal(s, np.float32) for s in shapes), "prompt", f"{n}.mp4") for n in range(2)]
    encoders = {component.name: fingerprint(folder / "model", component) for component in (VAE, TEXT_ENCODER)}
    write_dataset(folder / "latents", records, CLIP, encoders=encoders)
    values = {
        "model": {"path": folder / "model", "dim": 96, "ffn_dim": 256, "heads": 4, "layers": 4, "dtype": "float32"},
        "clip": CLIP,
        "data": {"path": folder / "latents"},
        "lora": {"rank": 2},
        "objective": {"kind": "fm"},
        "optimizer": {"learning_rate": 0.1},
        "train": {"output": folder / "run", "steps": 1, "sample_every": 1},
        "sampling": {"prompts": folder / "prompts.txt", "steps": 2, "guidance": 3, "seed": 4},
    }
    (folder / "config.yaml").write_text(json.dumps(values, default=str))  # JSON is YAML
    return folder


def test_samples_equal_those_of_the_exported_lora(world):
    options = ["--config", str(world / "config.yaml")]
    run = start(options)
    made = run / "samples"
    videos = [f"{folder}/{number}.mp4" for folder in ("base", "step_000001") for number in ("000", "001")]
    assert sorted(str(file.relative_to(made)) for file in made.rglob("*.mp4")) == videos
    assert (made / "prompts.txt").read_text().splitlines() == PROMPTS
    export(run, world / "lora.safetensors", "comfy", np.dtype(np.float32))
    saved = ["--config", str(run / "config.yaml")]
    sample(configured(SampleRun, [*saved, f"--sampling.lora={world}/lora.safetensors", f"--sampling.output={world}/s"]))
    for name in ("000.mp4", "001.mp4"):
        folders = (made / "step_000001", world / "s", made / "base")
        ours, later, base = (read_clip(folder / name, 5, 32, 48, 16) for folder in folders)
        assert np.array_equal(ours, later)
        assert not np.array_equal(ours, base)

    (world / "others.txt").write_text("a green disc")
    with pytest.raises(InputError, match=r"others.txt: the samples in .*/samples were made from other prompts; expec"):
        start([*options, "--train.steps=2", f"--sampling.prompts={world}/others.txt"], resume=True)


def test_a_signal_leaves_no_folder_and_a_bad_sample_no_video(world, tmp_path, monkeypatch, capsys):
    def decode(vae, latents, numbers, run):
        if numbers == [1]:
            raise InputError("prompt 1: the latents are not finite")
        return {0: np.zeros((5, 32, 48, 3), np.uint8)}

    # Asked in both rounds of one prompt, and before both videos: the first look ends in a round, the second between the
    # videos.
    signals = iter([None, "SIGINT", None, None, None, "SIGINT"])
    monkeypatch.setattr(interrupts, "requested", lambda: next(signals, None))
    monkeypatch.setattr(samples, "embed", lambda _, prompts, mesh: np.zeros((len(prompts), 512, TEXT_DIM), np.float32))
    monkeypatch.setattr(samples, "sample_round", lambda *arguments, on_step: on_step() or np.zeros((1, 2, 4, 6, 16)))
    monkeypatch.setattr(samples, "without_lora", lambda model: model)
    monkeypatch.setattr(samples, "load_vae", lambda path: None)
    monkeypatch.setattr(samples, "decode", decode)

    run = configured(TrainRun, ["--config", str(world / "config.yaml"), "--train.sample_every=2"])
    watcher, model = SampleVideos(run, one_device_mesh()), object.__new__(WanTransformer)
    watcher.open(About(tmp_path, 0, 3, 1))
    assert [step for step in range(1, 4) if watcher.wants(step)] == [1, 2, 3]  # the base is always wanted
    assert not list(watcher.look(0, model))
    assert not list(watcher.look(0, model))
    assert not (tmp_path / "samples" / "base").exists()
    (event,) = watcher.look(0, model)
    assert event == ("samples", 0, {"folder": str(tmp_path / "samples" / "base")})
    assert [file.name for file in (tmp_path / "samples" / "base").iterdir()] == ["000.mp4"]
    assert capsys.readouterr().err == "note: prompt 1: the latents are not finite; no video is written\n"
    assert [step for step in range(4) if watcher.wants(step)] == [2, 3]
    again = SampleVideos(run, one_device_mesh())
    again.open(About(tmp_path, 0, 3, 1))
    assert not again.wants(0)
