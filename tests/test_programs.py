"""The programs as a user meets them: the whole chain once, and one clear line for every mistake."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import virtual_devices
import yaml
from PIL import Image
from random_model import write_model
from safetensors.numpy import load_file, save_file

from tfm_jax import cli, video
from tfm_jax.config import parse
from tfm_jax.data.records import open_records
from tfm_jax.embedded.world import write_clips
from tfm_jax.lora.files import DIALECTS, Lora, read_lora, write_lora
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.train.loop import TrainRun
from tfm_jax.train.metrics import read_metrics
from tfm_jax.wan.tensors import open_safetensors
from tfm_jax.wan.transformer import TransformerConfig

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a red disc moves right, slowly", "一个蓝色的圆 🔵"]


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A tiny model, four clips, the configuration of all programs, prepared data and a run of two steps."""
    folder = tmp_path_factory.mktemp("world")
    write_clips(folder / "clips", 4, frames=5, size=(32, 48))
    write_model(folder / "model", PROMPTS)
    (folder / "prompts.txt").write_text(PROMPTS[0], encoding="utf-8")
    values = {
        "model": {"path": folder / "model", "dim": 96, "ffn_dim": 256, "heads": 4, "layers": 4, "dtype": "float32"},
        "clip": {"frames": 5, "height": 32, "width": 48},
        "data": {"source": folder / "clips", "path": folder / "latents"},
        "lora": {"rank": 2},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"output": folder / "run", "steps": 2, "batch_size": 2},
        "sampling": {"prompts": folder / "prompts.txt", "output": folder / "samples", "steps": 2},
    }
    (folder / "config.yaml").write_text(json.dumps(values, default=str), encoding="utf-8")  # JSON is YAML
    config = ["--config", str(folder / "config.yaml")]
    program("prepare_data").main(config)
    program("train").main(config)
    return folder


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a program as its `__main__` does."""

    def run(name: str, *arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.run(program(name).main)
        except SystemExit as done:
            code = done.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(call, world, tmp_path):
    """Run a program that must refuse: exit code 2, one line that holds all of `words`, no file made or changed."""

    def files() -> dict[Path, bytes | None]:
        found = [path for folder in (world, tmp_path) for path in folder.rglob("*")]
        return {path: path.read_bytes() if path.is_file() else None for path in found}

    def run(name: str, *arguments: str | Path, words: str | tuple[str, ...]) -> None:
        before = files()
        outcome = call(name, *arguments)
        assert_refused(outcome, words)
        assert files() == before

    return run


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


def save_yaml(file: Path, values: dict) -> list[str]:
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return ["--config", str(file)]


# --- The chain -------------------------------------------------------------------------------------------------------


def test_prepared_data_and_run(world):
    records = open_records(world / "latents")
    assert len(records) == 4
    assert records[0].latents.shape == (2, 4, 6, 16)
    assert records.facts["model"] == str(world / "model")
    assert not (world / "latents.partial").exists()
    assert [line["step"] for line in read_metrics(world / "run" / "metrics.jsonl")] == [1, 2]
    names = [".lock", "checkpoints", "config.yaml", "metrics.jsonl"]
    assert sorted(path.name for path in (world / "run").iterdir()) == names
    again = parse(TrainRun, ["--config", str(world / "run" / "config.yaml"), f"--data.source={world}/clips"], "", "")
    assert again == parse(TrainRun, config(world), "", "")


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
    names = [".lock", "000.mp4", "001.mp4", "config.yaml", "contact_sheet.png", "samples.json"]
    assert sorted(path.name for path in output.iterdir()) == names
    clips = [video.read_clip(output / f"00{n}.mp4", 5, 32, 48, 16) for n in (0, 1)]
    assert clips[0].shape == (5, 32, 48, 3)
    assert (clips[0] != clips[1]).any()
    assert Image.open(output / "contact_sheet.png").width > 5 * 100
    assert parse(SampleRun, ["--config", str(output / "config.yaml")], "", "").sampling.output == output


@pytest.mark.parametrize("layout", ["original", "tfm_jax"])
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


@pytest.mark.parametrize(
    "name",
    [
        "prepare_data",
        "train",
        "sample",
        "export_lora",
        "convert_weights",
        "benchmark",
        "evaluate",
        "demo",
        "pretrain",
        "study",
    ],
)
def test_help(call, name):
    outcome = call(name, "--help")
    assert outcome.code == 0
    assert f"python scripts/{name}.py" in outcome.out


# --- Mistakes in the configuration and on the command line -----------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--train.steps=0", "expected at least 1"),
        ("--train.steps=-1", "expected at least 1"),
        ("--train.steps=many", "expected a whole number"),
        ("--optimizer.learning_rate=0", "expected more than 0"),
        ("--optimizer.learning_rate=nan", "expected a finite number"),
        ("--lora.rank=0", "expected at least 1"),
        ("--train.stepz=5", "did you mean train.steps"),
    ],
)
def test_impossible_values(refused, world, option, words):
    refused("train", *config(world), option, words=(option, words))


@pytest.mark.parametrize(
    ("option", "words"), [("--clip.frames=6", "expected 4 n + 1"), ("--clip.height=40", "expected a multiple of 16")]
)
@pytest.mark.parametrize("name", ["prepare_data", "sample"])
def test_impossible_clips(refused, world, name, option, words):
    refused(name, *config(world), option, words=(option, words))


@pytest.mark.parametrize("name", ["prepare_data", "train", "sample"])
def test_no_configuration(refused, tmp_path, name):
    refused(name, words=(f"{name}.py", "--config FILE is missing"))
    refused(name, f"--config={tmp_path}/none.yaml", words=(f"{tmp_path}/none.yaml", "expected a configuration"))


def test_unknown_names_in_the_configuration(refused, world, tmp_path):
    values = yaml.safe_load((world / "config.yaml").read_text())
    field = save_yaml(tmp_path / "field.yaml", values | {"lora": {"ranck": 4}})
    refused("sample", *field, words=(str(tmp_path / "field.yaml"), "unknown field lora.ranck; did you mean lora.rank?"))
    section = save_yaml(tmp_path / "section.yaml", values | {"optimiser": {}})
    refused("train", *section, words="unknown section optimiser; did you mean optimizer?")


# --- Mistakes in files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("video,caption\n0000.mp4,a disc\n", ("metadata.csv:1", "'prompt'", "expected one")),
        ("video,prompt\n0009.mp4,a disc\n", ("metadata.csv:2", "video='0009.mp4'", "no such file")),
        ("video,prompt\n../0000.mp4,a disc\n", ("metadata.csv:2", "video='../0000.mp4'", "leads out of the folder")),
        ("video,prompt\n", ("metadata.csv", "no rows")),
        ("", ("metadata.csv", "no rows")),
        (None, ("metadata.csv", "no such file")),
    ],
)
def test_metadata(refused, world, tmp_path, table, words):
    (tmp_path / "clips").mkdir()
    if table is not None:
        (tmp_path / "clips" / "metadata.csv").write_text(table)
    options = [f"--data.source={tmp_path}/clips", f"--data.path={tmp_path}/latents"]
    refused("prepare_data", *config(world), *options, words=(str(tmp_path), *words))


def test_clips(call, refused, world, tmp_path):
    """Their files are known only once the encoders are at work."""
    options = [*config(world), f"--data.path={tmp_path}/latents"]
    refused("prepare_data", *options, "--clip.frames=9", words=("0000.mp4: 5 frames", "expected enough for 9 frames"))
    refused("prepare_data", *config(world), words=(str(world / "latents"), "already exists and is not empty"))
    shutil.copytree(world / "clips", tmp_path / "clips")
    (tmp_path / "clips" / "0002.mp4").write_text("not a video")
    outcome = call("prepare_data", *options, f"--data.source={tmp_path}/clips")
    file = tmp_path / "latents" / "rejected.jsonl"
    assert (outcome.code, outcome.out) == (0, f"{file.parent}: 3 of 4 clips; 1 rejected: see {file}\n"), outcome.err
    assert "clips/0002.mp4: damaged or not a video" in file.read_text()
    assert len(open_records(file.parent)) == 3


@pytest.mark.parametrize("name", ["prepare_data", "train", "sample"])
def test_folders_that_hold_no_model(refused, world, tmp_path, name):
    fresh = [f"--data.path={tmp_path}/latents"] if name == "prepare_data" else [f"--train.output={tmp_path}/run"]
    options = [*config(world), *(fresh if name != "sample" else [])]
    refused(name, *options, f"--model.path={tmp_path}/none", words=(f"{tmp_path}/none", "expected"))
    refused(name, *options, f"--model.path={world}/clips", words=(f"{world}/clips", "expected"))


def test_the_configuration_of_another_model(refused, world, tmp_path):
    options = ["--config", ROOT / "configs" / "wan2.1_t2v_14b.yaml", f"--model.path={world}/model"]
    options += [f"--data.path={world}/latents", f"--train.output={tmp_path}/run"]
    options += ["--clip.frames=5", "--clip.height=32", "--clip.width=48"]
    refused("train", *options, words=("model/transformer/config.json", "dim 96", "model.dim=5120"))


def test_weights_that_are_not_numbers(refused, world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.attn1.to_q.weight"][3, 4] = np.nan
    save_file(tensors, file)
    options = [*config(world), f"--model.path={tmp_path}/model", f"--train.output={tmp_path}/run"]
    refused("train", *options, words=("model/transformer", "blocks.1.attn1.to_q.weight has a NaN"))
    words = ("model/transformer", "blocks.1.attn1.to_q.weight has a NaN")
    refused("convert_weights", tmp_path / "model", tmp_path / "new", "--to=tfm_jax", words=words)


# --- Mistakes in training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--lora.targets=[q, to_q]", ("lora.targets: 'to_q' names no linear map", "ffn.0")),
        ("--lora.rank=97", ("lora.rank=97", "width of self_attn.q, 96")),
        ("--train.batch_size=5", ("train.batch_size=5", "latents has only 4 clips")),
        ("--mesh.fsdp=2", ("mesh.fsdp=2 does not divide the 1 devices", "use one of 1")),
        ("--data.path=nowhere", ("nowhere", "expected a folder that prepare_data.py wrote")),
    ],
)
def test_runs_that_cannot_be(refused, world, tmp_path, option, words):
    refused("train", *config(world), f"--train.output={tmp_path}/run", option, words=words)


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


def test_outputs_that_are_taken(refused, world, tmp_path):
    refused("train", *config(world), words=(f"train.output={world}/run", "already contains a run", "--resume"))
    (tmp_path / "file").write_text("")
    refused("train", *config(world), f"--train.output={tmp_path}/file", words="expected a directory")


def test_a_folder_that_cannot_be_made(refused, world, tmp_path):
    """As on a disk that is read-only."""
    (tmp_path / "file").write_text("")
    refused("train", *config(world), f"--train.output={tmp_path}/file/run", words=(f"{tmp_path}/file", "irectory"))
    refused("prepare_data", *config(world), f"--data.path={tmp_path}/file/latents", words=f"{tmp_path}/file")
    refused("convert_weights", world / "model", tmp_path / "file" / "new", "--to=tfm_jax", words=f"{tmp_path}/file")


@pytest.mark.parametrize(
    ("option", "before"),
    [
        ("--lora.rank=4", "2"),
        ("--lora.targets=[q, k]", "['q', 'k', 'v', 'o', 'ffn.0', 'ffn.2']"),
        ("--train.seed=7", "0"),
        ("--train.batch_size=1", "2"),
        ("--objective.kind=fm", "tfm"),
    ],
)
def test_resuming_as_another_run(refused, world, option, before):
    field = option[2:].partition("=")[0]
    options = [*config(world), "--train.steps=3", "--resume", option]
    refused("train", *options, words=(f"{field}=", f"{world}/run was started with {before}"))


# --- Mistakes in export, sampling and conversion ---------------------------------------------------------------------


def test_a_run_without_a_good_checkpoint_does_not_start_again_by_itself(call, world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    (run / "checkpoints/2/_CHECKPOINT_METADATA").write_bytes(b"")
    for _ in range(2):
        outcome = call("train", *config(world), f"--train.output={run}", "--train.steps=3", "--resume")
        assert_refused(outcome, (f"train.output={run}: all checkpoints are damaged (2.damaged)", "remove this one"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2.damaged"]


def test_exports(refused, world, tmp_path):
    file = tmp_path / "lora.safetensors"
    refused("export_lora", world / "clips", file, words=(f"{world}/clips", "expected the train.output"))
    refused("export_lora", tmp_path / "none", file, words=(f"{tmp_path}/none", "expected the train.output"))
    refused(
        "export_lora",
        world / "run",
        file,
        "--step=7",
        words=(f"{world}/run", "no checkpoint of step 7", "expected one of 2"),
    )
    file.write_text("mine")
    refused("export_lora", world / "run", file, words=(str(file), "already there"))


@pytest.fixture
def lora(call, world, tmp_path) -> Path:
    """The LoRA of the run."""
    call("export_lora", world / "run", tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_loras_that_do_not_fit(refused, world, tmp_path, lora):
    options = [*config(world), f"--sampling.output={tmp_path}/new"]
    refused("sample", *options, "--sampling.lora=none.safetensors", words=("none.safetensors", "no such file"))
    whole = read_lora(lora)

    def write(name: str, adapters: dict) -> str:
        write_lora(tmp_path / name, Lora(adapters, whole.rank, whole.alpha))
        return f"--sampling.lora={tmp_path}/{name}"

    wide = write("wide", {n: a._replace(a=np.tile(a.a, 2), b=np.tile(a.b, (2, 1))) for n, a in whole.adapters.items()})
    refused("sample", *options, wide, words=(f"{tmp_path}/wide", "self_attn.q is [2, 192]", "expected [2, 96]"))
    deep = write("deep", {**whole.adapters, "blocks.4.ffn.2": whole.adapters["blocks.3.ffn.2"]})
    refused("sample", *options, deep, words=(f"{tmp_path}/deep", "blocks.4.ffn.2", "each of 4 layers"))
    (tmp_path / "page").write_text("<!DOCTYPE html><html>")
    refused("sample", *options, f"--sampling.lora={tmp_path}/page", words=(f"{tmp_path}/page", "HTML page"))


def test_samples_that_cannot_be(refused, world, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000.mp4").write_text("mine")
    words = (f"sampling.output={tmp_path}/full", "expected a new or empty directory")
    refused("sample", *config(world), f"--sampling.output={tmp_path}/full", words=words)
    (tmp_path / "prompts.txt").write_text("\n \n")
    words = (f"sampling.prompts={tmp_path}/prompts.txt", "no prompt")
    refused("sample", *config(world), f"--sampling.prompts={tmp_path}/prompts.txt", words=words)
    shutil.copytree(world / "model", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vae")
    words = (f"{tmp_path}/model: no vae found", "expected vae/config.json")
    refused("sample", *config(world), f"--model.path={tmp_path}/model", words=words)


def test_conversions(refused, world, tmp_path):
    refused("convert_weights", world / "clips", tmp_path / "new", "--to=tfm_jax", words="no network of Wan2.1 found")
    refused("convert_weights", tmp_path / "none", tmp_path / "new", "--to=tfm_jax", words="no such directory")
    refused(
        "convert_weights", world / "model", world / "run", "--to=tfm_jax", words=f"target={world}/run: already exists"
    )
    refused("convert_weights", world / "model", tmp_path / "new", "--to=theirs", words=("'theirs'", "tfm_jax"))
    refused("convert_weights", world / "model", words="target")


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_conversion_holds_a_tensor_or_two(world, tmp_path):
    """200 MB of weights, the largest tensor 8 MB: the program needs little more than for a model of 3 MB."""
    benchmark = program("benchmark")
    model = TransformerConfig(dim=512, ffn_dim=4096, heads=4, layers=8)
    benchmark.write_checkpoint(tmp_path / "large" / "transformer", model)
    peaks = []
    for name, source in (("small", world / "model" / "transformer"), ("new", tmp_path / "large")):
        command = [sys.executable, ROOT / "scripts" / "convert_weights.py", source, tmp_path / name, "--to=tfm_jax"]
        peaks.append(benchmark.watch(command, interval=0.005).anonymous)
    assert peaks[0] > 50e6  # it was looked at while it ran
    assert peaks[1] - peaks[0] < 40e6

    before = load_file(tmp_path / "large" / "transformer" / "diffusion_pytorch_model.safetensors")
    after = open_safetensors(tmp_path / "new" / "transformer" / "model.safetensors")
    for layer in (0, 7):
        kernel = before[f"blocks.{layer}.ffn.net.2.weight"].T.astype(ml_dtypes.bfloat16)
        assert (after["blocks.ffn.down.kernel"].read((layer,)) == kernel).all()
