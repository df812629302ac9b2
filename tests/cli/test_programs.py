"""The programs as a user meets them: the whole chain once."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from benchmarks.usage import run_and_watch
from benchmarks.weights import write_checkpoint
from helpers import virtual_devices
from helpers.clips import smooth_clip
from helpers.paths import ROOT
from helpers.tiny_world import PROMPTS, Outcome, write_world
from PIL import Image
from safetensors.numpy import load_file

from tfm_jax import video
from tfm_jax.config import load
from tfm_jax.data.records import open_records
from tfm_jax.lora.files import read_lora
from tfm_jax.lora.keys import DIALECTS
from tfm_jax.moving_shapes.world import write_clips
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.train.metrics import read_metrics
from tfm_jax.train.run import TrainRun
from tfm_jax.wan.tensors import open_safetensors
from tfm_jax.wan.transformer import TransformerConfig


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A tiny model, four clips, the configuration of all programs, prepared data and a run of two steps."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, steps=2)
    return folder


def assert_refused(outcome: Outcome, words: str | tuple[str, ...]) -> None:
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.splitlines() if "error" in line.lower()]
    assert outcome.err.splitlines()[-1:] == lines, outcome.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome.err
    for word in [words] if isinstance(words, str) else words:
        assert word in lines[0], lines[0]


def config(world: Path) -> list[str]:
    return ["--config", str(world / "config.yaml")]


# --- The chain -------------------------------------------------------------------------------------------------------


def test_prepared_data_and_run(world):
    records = open_records(world / "latents")
    assert len(records) == 4
    assert records[0].latents.shape == (2, 4, 6, 16)
    assert records.manifest.model == str(world / "model")
    assert not (world / "latents.partial").exists()
    assert [line["step"] for line in read_metrics(world / "run" / "metrics.jsonl")] == [1, 2]
    names = [".lock", "checkpoints", "config.yaml", "environment.json", "events.jsonl", "metrics.jsonl"]
    assert sorted(path.name for path in (world / "run").iterdir()) == names
    again = load(TrainRun, world / "run" / "config.yaml", {"data.source": f"{world}/clips"})
    assert again == load(TrainRun, world / "config.yaml")


def test_a_dry_run_encodes_nothing(call, world, tmp_path):
    """It needs no weights either."""
    options = [*config(world), f"--data.path={tmp_path}/new", f"--model.path={tmp_path}/none", "--dry-run"]
    outcome = call("prepare_data", *options, "--clip.frames=1", "--clip.part=windows")
    assert outcome.code == 0, outcome.err
    assert "to encode: 1 seconds of video, in 20 calls of the autoencoder" in outcome.out
    assert f"{tmp_path}/new.report.csv: a line for each of the 4 files" in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["new.report.csv"]
    assert (tmp_path / "new.report.csv").read_text().splitlines()[1].startswith("0000.mp4,5,16,0.31")


def test_prepared_clips_are_inspected(call, world, tmp_path):
    shutil.copytree(world / "latents", tmp_path / "latents")
    options = [*config(world), f"--data.path={tmp_path}/latents", "--inspect"]
    outcome = call("prepare_data", *options)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"{tmp_path}/latents: 4 clips, ")
    assert outcome.out.endswith(f"{tmp_path}/latents/contact_sheet.png: 4 clips, decoded from their latents\n")
    with Image.open(tmp_path / "latents" / "contact_sheet.png") as picture:
        assert picture.width > 9 * 128
    assert_refused(call("prepare_data", *options, "--dry-run"), "--dry-run and --inspect: expected one of them")


def test_the_configuration_of_a_run_serves_sampling(call, world, tmp_path):
    options = [f"--sampling.prompts={world}/prompts.txt", f"--sampling.output={tmp_path}/new", "--sampling.steps=2"]
    outcome = call("sample", "--config", str(world / "run" / "config.yaml"), *options)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "new" / "000.mp4").exists()


def test_a_run_that_is_resumed(call, world, tmp_path):
    """Longer, and from another folder: the fields that may change."""
    shutil.copytree(world / "run", tmp_path / "run")
    outcome = call("train", *config(world), f"--train.output={tmp_path}/run", "--train.steps=3", "--resume")
    assert outcome.code == 0, outcome.err
    assert f"resumed {tmp_path}/run after step 2" in outcome.out
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert "step 3/3  loss" in outcome.err


def test_every_dialect_is_exported(call, world, tmp_path):
    changes = []
    for dialect in DIALECTS:
        file = tmp_path / f"{dialect}.safetensors"
        outcome = call("export_lora", world / "run", file, f"--dialect={dialect}", "--dtype=float32")
        assert outcome.out == f"{file}: 40 adapters after step 2 ({dialect}, float32)\n"
        lora = read_lora(file)
        changes.append({name: lora.alpha / lora.rank * b @ a for name, (a, b) in lora.adapters.items()})
    assert all(change.any() for change in changes[0].values())
    for other in changes[1:]:
        assert other.keys() == changes[0].keys()
        for name, change in other.items():
            np.testing.assert_allclose(change, changes[0][name], atol=1e-6 * np.abs(change).max())


def test_samples(call, world, tmp_path):
    call("export_lora", world / "run", tmp_path / "lora.safetensors")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    options = [*config(world), f"--sampling.prompts={tmp_path}/prompts.txt", f"--sampling.output={tmp_path}/my samples"]
    outcome = call("sample", *options, f"--sampling.lora={tmp_path}/lora.safetensors")
    assert outcome.code == 0, outcome.err
    output = tmp_path / "my samples"
    names = [".lock", "000.mp4", "000.safetensors", "001.mp4", "001.safetensors", "config.yaml", "contact_sheet.png",
             "samples.json"]  # fmt: skip
    assert sorted(path.name for path in output.iterdir()) == names
    clips = [video.read_clip(output / f"00{n}.mp4", 5, 32, 48, 16) for n in (0, 1)]
    assert clips[0].shape == (5, 32, 48, 3)
    assert (clips[0] != clips[1]).any()
    assert Image.open(output / "contact_sheet.png").width > 5 * 100
    assert load(SampleRun, output / "config.yaml").sampling.output == output


@pytest.mark.parametrize("layout", ["original", "comfy", "tfm_jax"])
def test_converted_and_back(call, world, tmp_path, layout):
    assert call("convert_weights", world / "model", tmp_path / "other", f"--to={layout}", "--dtype=float32").code == 0
    outcome = call("convert_weights", tmp_path / "other", tmp_path / "back", "--to=diffusers", "--dtype=float32")
    assert (
        outcome.out
        == f"{tmp_path}/back: transformer, vae, text_encoder, tokenizer, scheduler (diffusers layout, float32)\n"
    )
    names = {str(path.relative_to(world / "model")) for path in (world / "model").rglob("*")}
    assert names == {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*")}
    for name in names:
        if name.endswith(".safetensors"):
            before, after = load_file(world / "model" / name), load_file(tmp_path / "back" / name)
            assert before.keys() == after.keys()
            assert all((before[tensor] == after[tensor]).all() for tensor in before)


def test_a_poor_environment(world, tmp_path):
    """A program of its own in another folder: a path with spaces, ASCII for a locale, neither HOME nor PATH."""
    folder = tmp_path / "my clips"
    write_clips(folder, 1, frames=5, size=(32, 32))
    (folder / "metadata.csv").write_text(f"video,prompt\n0000.mp4,{PROMPTS[1]}\n", encoding="utf-8")
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = [*config(world), "--data.source=my clips", "--data.path=my latents"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "prepare_data.py", *options],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "my latents: 1 clip\n", done.stderr
    assert open_records(tmp_path / "my latents")[0].prompt == PROMPTS[1]


def test_images_are_clips_of_one_frame(call, world, tmp_path):
    """A list of absolute paths of images: the autoencoder encodes one frame, and training takes it."""
    rows = []
    for number, suffix in enumerate(("png", "jpg", "webp")):
        Image.fromarray(smooth_clip(1, seed=number)[0]).save(tmp_path / f"{number}.{suffix}")
        rows.append({"video": f"{tmp_path}/{number}.{suffix}", "prompt": f"picture {number}"})
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*config(world), f"--data.path={tmp_path}/latents", "--clip.frames=1"]
    source = [f"--data.source={tmp_path}/list.jsonl", "--data.absolute_paths=true"]
    outcome = call("prepare_data", *options, *source)
    assert (outcome.code, outcome.out) == (0, f"{tmp_path}/latents: 3 clips\n"), outcome.err
    assert f"{tmp_path}/list.jsonl (JSONL): 3 clips, 1 frames of 32 x 48 pixels" in outcome.err
    records = open_records(tmp_path / "latents")
    assert [records[n].latents.shape for n in range(3)] == [(1, 4, 6, 16)] * 3
    assert records[2].video == f"{tmp_path}/2.webp"
    outcome = call("train", *options, f"--train.output={tmp_path}/run", "--train.steps=1")
    assert outcome.code == 0, outcome.err
    assert np.isfinite(read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"])


PROGRAMS = {
    "train": "tfm-train", "sample": "tfm-sample", "convert_weights": "tfm-convert", "prepare_data": "tfm-prepare",
    "export_lora": "tfm-export", "lora": "tfm-lora", "plan": "tfm-plan", "evaluate": "tfm-evaluate",
    "report": "tfm-report",
}  # fmt: skip
"""Script -> console command."""


@pytest.mark.parametrize("name", [*PROGRAMS, "benchmark", "demo", "pretrain", "study", "scaling"])
def test_help(call, name):
    outcome = call(name, "--help")
    assert outcome.code == 0
    assert PROGRAMS.get(name, f"python scripts/{name}.py") in outcome.out


@pytest.mark.parametrize("name", ["train", "sample", "prepare_data", "plan", "study"])
def test_help_shows_the_values_of_the_configuration(call, world, name):
    outcome = call(name, *config(world), "--help")
    assert outcome.code == 0
    text = " ".join(outcome.out.replace("│", " ").split())
    assert "feed-forward network. (default: 256)" in text
    assert "(default: 48)" in text


def test_planning_a_sampling_step_has_the_fields_of_sampling(call, world):
    assert "--sampling.steps INT" not in call("plan", *config(world), "--help").out
    assert "--sampling.steps INT" in call("plan", *config(world), "--sampling", "--help").out


def test_console_commands():
    with open(ROOT / "pyproject.toml", "rb") as file:
        commands = tomllib.load(file)["project"]["scripts"]
    assert set(commands) == set(PROGRAMS.values())
    for name, command in PROGRAMS.items():
        module, function = commands[command].split(":")
        main = getattr(importlib.import_module(module), function)
        assert callable(main)
        script = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8")
        assert f"from {module} import {function}\n" in script
        assert f"`{command}`" in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(call, tmp_path, shell):
    outcome = call("train", "--tyro-write-completion", shell, tmp_path / "completion")
    assert outcome.code in (0, None), outcome.err
    text = (tmp_path / "completion").read_text(encoding="utf-8")
    assert "tfm-train" in text
    assert "train.batch_size" in text


def test_a_shipped_configuration_from_another_directory(tmp_path):
    """Neither the configuration nor the embedded model depends on the working directory."""
    write_clips(tmp_path / "my clips", 1, frames=17, size=(64, 64))
    options = ["--config", "wan_tiny", "--data.source=my clips", "--data.path=latents"]
    done = subprocess.run(
        [sys.executable, "-c", "from tfm_jax.cli.prepare import main; main()", *options],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "latents: 1 clip\n", done.stderr
    assert open_records(tmp_path / "latents").manifest.model == "wan_tiny"


def test_planning_does_not_touch_accelerators():
    code = "import os, tfm_jax.cli.plan, jax; print(os.environ['JAX_PLATFORMS'], jax.config.jax_platforms)"
    environment = {**os.environ, "JAX_PLATFORMS": "tpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "cpu cpu\n", done.stderr


# --- Mistakes beyond the table of bad input ------------------------------------------------------------------------


def test_a_clip_that_cannot_be_used(call, world, tmp_path):
    """It is known only once the encoders are at work."""
    shutil.copytree(world / "clips", tmp_path / "clips")
    (tmp_path / "clips" / "0002.mp4").write_text("not a video")
    options = [f"--data.path={tmp_path}/latents", f"--data.source={tmp_path}/clips", "--data.max_rejected=0.25"]
    outcome = call("prepare_data", *config(world), *options)
    file = tmp_path / "latents" / "rejected.jsonl"
    assert (outcome.code, outcome.out) == (0, f"{file.parent}: 3 clips; 1 video rejected: see {file}\n"), outcome.err
    [line] = map(json.loads, file.read_text().splitlines())
    assert (line["line"], line["video"]) == (4, "0002.mp4")
    assert line["reason"].startswith("is damaged or not a video")
    assert len(open_records(file.parent)) == 3


def test_batch_that_the_devices_cannot_share(world, tmp_path):
    options = [*config(world), f"--train.output={tmp_path}/run", "--train.batch_size=4"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train.py", *options],
        env=virtual_devices.environment(3),
        capture_output=True,
        text=True,
    )
    words = "train.batch_size=4: expected a multiple of mesh.data=3 x mesh.fsdp=1; use 6"
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), words)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_good_checkpoint_does_not_start_again_by_itself(call, world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    (run / "checkpoints/2/_CHECKPOINT_METADATA").write_bytes(b"")
    for _ in range(2):
        outcome = call("train", *config(world), f"--train.output={run}", "--train.steps=3", "--resume")
        assert_refused(outcome, (f"train.output={run}: all checkpoints are damaged (2.damaged)", "remove this one"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2.damaged"]


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_conversion_holds_a_tensor_or_two(world, tmp_path):
    """200 MB of weights, the largest tensor 8 MB: the program needs little more than for a model of 3 MB."""
    model = TransformerConfig(dim=512, ffn_dim=4096, heads=4, layers=8)
    write_checkpoint(tmp_path / "large" / "transformer", model)
    peaks = []
    for name, source in (("small", world / "model" / "transformer"), ("new", tmp_path / "large")):
        command = [sys.executable, ROOT / "scripts" / "convert_weights.py", source, tmp_path / name, "--to=tfm_jax"]
        peaks.append(run_and_watch(command, interval=0.005).peak_memory)
    assert peaks[0] > 50e6  # it was looked at while it ran
    assert peaks[1] - peaks[0] < 40e6

    before = load_file(tmp_path / "large" / "transformer" / "diffusion_pytorch_model.safetensors")
    after = open_safetensors(tmp_path / "new" / "transformer" / "model.safetensors")
    for layer in (0, 7):
        kernel = before[f"blocks.{layer}.ffn.net.2.weight"].T.astype(ml_dtypes.bfloat16)
        assert (after["blocks.ffn.down.kernel"].read((layer,)) == kernel).all()
