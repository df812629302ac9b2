"""Sampling: the noise levels, the Euler loop and guidance, against diffusers' scheduler and transformer."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from flax import nnx
from helpers import virtual_devices
from helpers.random_model import write_model
from helpers.wan_reference import SIZES, inputs, reference_transformer, relative, run_reference
from safetensors.numpy import load_file, save_file

from tfm_jax import files, interrupts, video
from tfm_jax.cli import command
from tfm_jax.config import ClipConfig, ModelConfig, SamplingConfig, load
from tfm_jax.errors import InputError, StoppedEarly
from tfm_jax.lora.files import Adapter, Lora, write_lora
from tfm_jax.moving_shapes.pretraining.network import initialise
from tfm_jax.sampling import outputs, pipeline, sample_latents
from tfm_jax.sampling.outputs import Samples, digest_weights
from tfm_jax.sampling.pipeline import SampleRun, sample
from tfm_jax.sampling.solvers import euler, noise_levels
from tfm_jax.wan import load_transformer
from tfm_jax.wan.layouts import TEXT_ENCODER, source_of
from tfm_jax.wan.saving import save_model
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.transformer import WanTransformer

CONFIG = SIZES["small"]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# --- Noise levels and the solver -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (50, 1.0), (7, 3.0), (1, 5.0)])
def test_levels_are_those_of_the_specification(steps, shift):
    even = np.linspace(1, 0, steps + 1)[:-1]
    levels = np.asarray(noise_levels(steps, shift))
    np.testing.assert_allclose(levels[:-1], shift * even / (1 + (shift - 1) * even), rtol=1e-6)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_a_straight_path_ends_at_the_clean_video(steps):
    """The velocity (x - clean) / sigma points from every point of the path away from its end."""
    clean, noise = normal(0, 2, 3, 4, 4, 5), normal(1, 2, 3, 4, 4, 5)
    result = euler(lambda x, sigma: (x - clean) / sigma, noise, noise_levels(steps, 5.0))
    np.testing.assert_allclose(result, clean, atol=2e-6)


def test_a_linear_field_multiplies_by_every_step():
    noise, levels = normal(0, 1, 2, 2, 2, 3), noise_levels(10, 5.0)
    result = euler(lambda x, sigma: (0.5 + sigma) * x, noise, levels)
    factors = 1 + np.diff(np.float64(levels)) * (0.5 + np.float64(levels[:-1]))
    np.testing.assert_allclose(result, noise * np.prod(factors), rtol=1e-5)


# --- Guidance --------------------------------------------------------------------------------------------------------


class TextMean(WanTransformer):
    """Stands for the network: its velocity is the mean of the text, and it notes the shapes that it is called with."""

    calls: tuple = ()

    def __init__(self):
        self.config = CONFIG
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, latents, timestep, text):
        TextMean.calls += ((latents.shape, timestep.shape, text.shape),)
        return latents * 0 + self.weight[...] * text.mean((1, 2))[:, None, None, None, None]


@pytest.mark.parametrize(("guidance", "rows"), [(5.0, 6), (0.0, 6), (1.0, 3)])
def test_guidance(guidance, rows):
    """v(negative) + guidance (v(text) - v(negative)) from one call a step; guidance 1 does without the negative."""
    TextMean.calls = ()
    noise, text, negative = normal(0, 3, 2, 4, 4, 5), normal(1, 3, 8, 6), normal(2, 3, 8, 6)
    result = sample_latents(TextMean(), noise, text, negative, steps=4, guidance=guidance)
    assert TextMean.calls == (((rows, 2, 4, 4, 5), (rows,), (rows, 8, 6)),)  # traced once for all steps
    of_text, of_negative = (np.asarray(x.mean((1, 2))) for x in (text, negative))
    velocity = of_negative + guidance * (of_text - of_negative)
    np.testing.assert_allclose(result, noise - velocity[:, None, None, None, None], atol=1e-5)


def test_on_step_is_called_once_a_step():
    count = []
    noise, text = normal(0, 1, 1, 2, 2, 3), normal(1, 1, 8, 6)
    sample_latents(TextMean(), noise, text, text, steps=7, on_step=lambda: count.append(1))
    assert len(count) == 7


def test_an_exception_of_on_step_ends_the_sampling():
    count = []

    def on_step():
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt

    noise, text = normal(0, 1, 1, 2, 2, 3), normal(1, 1, 8, 6)
    with pytest.raises(KeyboardInterrupt):
        sample_latents(TextMean(), noise, text, text, steps=7, on_step=on_step)
    assert len(count) == 2


# --- Against diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_loop_equals_diffusers(tmp_path, guidance):
    steps, shift = 4, 5.0
    reference = reference_transformer(CONFIG)
    reference.save_pretrained(tmp_path / "transformer")
    batch, text = inputs(CONFIG, 1, 3, 4, 6), jnp.asarray(inputs(CONFIG, 2, 1, 2, 2, seed=1)["text"])
    ours = sample_latents(
        load_transformer(tmp_path, jnp.float32), jnp.asarray(batch["latents"]), text[:1], text[1:],
        steps=steps, shift=shift, guidance=guidance,
    )  # fmt: skip

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    x = torch.from_numpy(batch["latents"])
    for timestep in scheduler.timesteps:
        t = timestep.numpy().reshape(1)
        positive, negative = (
            run_reference(reference, {"latents": x.numpy(), "timestep": t, "text": np.asarray(text[n : n + 1])})
            for n in (0, 1)
        )
        velocity = torch.from_numpy(negative + guidance * (positive - negative))
        x = scheduler.step(velocity, timestep, x).prev_sample
    assert len(scheduler.timesteps) == steps
    assert relative(ours, x.numpy()) <= 1e-4


# --- A run -----------------------------------------------------------------------------------------------------------

PROMPTS = ["a red disc moves right", "a blue square", "一个蓝色的圆 🔵"]
STEPS = 2
SIZE = {"dim": 96, "ffn_dim": 256, "heads": 4, "layers": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sampling") / "model"
    write_model(path, PROMPTS)
    return path


def run_of(model: Path, output: Path, **settings) -> SampleRun:
    prompts = settings.pop("prompts", None) or model.parent / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return SampleRun(
        model=ModelConfig(path=model, dtype="float32", **SIZE),
        clip=ClipConfig(frames=5, height=32, width=48),
        sampling=SamplingConfig(**{"prompts": prompts, "output": output, "steps": STEPS, **settings}),
    )


@pytest.fixture(scope="module")
def finished(model) -> Path:
    """The folder of a run that nothing disturbed."""
    sample(run_of(model, model.parent / "finished"))
    return model.parent / "finished"


@pytest.fixture
def rounds(monkeypatch) -> list[np.ndarray]:
    """Noise of every round that is sampled while the test runs; the step that is tried first does not count."""
    noises = []

    def record(transformer, noise, *arguments, steps, **options):
        if steps == STEPS:
            noises.append(np.asarray(noise))
        return sample_latents(transformer, noise, *arguments, steps=steps, **options)

    monkeypatch.setattr(pipeline, "sample_latents", record)
    return noises


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, apart from the paths in it that name the folder."""
    own = ("config.yaml", "samples.json")
    return {path.name: b"" if path.name in own else path.read_bytes() for path in folder.iterdir()}


VIDEOS = ["000.mp4", "001.mp4", "002.mp4"]


def test_what_a_run_leaves(finished):
    assert sorted(content(finished)) == [".lock", *VIDEOS, "config.yaml", "contact_sheet.png", "samples.json"]
    assert load(SampleRun, finished / "config.yaml").sampling.output == finished
    clips = [video.read_clip(finished / name, 5, 32, 48, 16) for name in VIDEOS]
    assert (clips[0] != clips[1]).any()


def test_the_same_command_makes_what_is_missing(finished, model, tmp_path, rounds):
    """With the same bytes as the undisturbed run, and without touching what is there."""
    run = run_of(model, tmp_path / "out")
    shutil.copytree(finished, tmp_path / "out")
    for name in ("001.mp4", "contact_sheet.png"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / ".001.mp4.partial").write_text("half a video")
    before = (tmp_path / "out" / "000.mp4").stat().st_mtime_ns
    sample(run)
    assert content(tmp_path / "out") == content(finished)
    assert len(rounds) == 1
    assert (tmp_path / "out" / "000.mp4").stat().st_mtime_ns == before


def test_a_missing_sheet_is_made_without_the_model(finished, model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_vae", None)
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "contact_sheet.png").unlink()
    sample(run_of(model, tmp_path / "out"))
    assert content(tmp_path / "out") == content(finished)


def test_a_finished_run_is_told(finished, model, monkeypatch, capsys):
    """Also when the files that it was made from are somewhere else now."""
    monkeypatch.setattr(pipeline, "load_vae", None)
    moved = shutil.copytree(model, model.parent / "moved" / "model")
    sample(run_of(moved, finished))
    assert capsys.readouterr().out == f"{finished}: all 3 videos are there already\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, r"sampling\.seed=4: .* begun with 0"),
        ({"steps": 3}, r"sampling\.steps=3: .* begun with 2"),
        ({"guidance": 4.0}, r"sampling\.guidance=4\.0: .* begun with 5\.0"),
        ({"negative_prompt": "rain"}, r"sampling\.negative_prompt=rain: "),
        ({"prompts": PROMPTS[:2]}, r"sampling\.prompts=.*begun with 3 prompts, not 2"),
        ({"prompts": [*PROMPTS[:2], "x"]}, r"sampling\.prompts=.* have another prompt 2: '一个蓝色的圆 🔵'"),
        ({"lora": "new"}, r"sampling\.lora=.* begun with another LoRA"),
        ({"model": "new"}, r"model\.path=.* begun with other weights"),
    ],
)
def test_the_folder_of_another_run_is_refused(finished, model, tmp_path, rounds, change, words):
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
    adapters = {f"blocks.{n}.self_attn.q": Adapter(np.ones((2, 96), "f4"), np.ones((96, 2), "f4")) for n in range(4)}
    write_lora(path, Lora(adapters, 2, 2.0))
    return path


def damage(component: Path, change) -> None:
    """Change the tensors of a network in their file."""
    (file,) = component.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


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
        ("transformer", lambda tensors: tensors["proj_out.weight"].fill(3e38), "prompt 0: the latents are not finite"),
    ],
)
def test_a_bad_network_is_refused_before_sampling(model, tmp_path, rounds, component, change, words):
    copy = shutil.copytree(model, tmp_path / "model")
    damage(copy / component, change)
    with pytest.raises(InputError, match=words):
        sample(run_of(copy, tmp_path / "new" / "out"))
    assert not rounds
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_that_is_not_there_is_refused_before_any_network_is_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_vae", None)
    copy = shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(InputError, match="tokenizer: none in"):
        sample(run_of(copy, tmp_path / "out"))


def test_networks_that_do_not_fit_together_are_refused(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(copy / "text_encoder")
    config = TextEncoderConfig(vocab_size=256, dim=32, heads=2, head_dim=16, ffn_dim=64, layers=1)
    encoder = source_of(initialise(TEXT_ENCODER, config, 0), TEXT_ENCODER)
    save_model([encoder], None, tmp_path / "other", "diffusers", jnp.float32)
    shutil.move(tmp_path / "other" / "text_encoder", copy / "text_encoder")
    with pytest.raises(InputError, match="text width of the text encoder: 32; expected 64"):
        sample(run_of(copy, tmp_path / "out"))


@pytest.mark.parametrize("guidance", ["1e38", "1001", "inf", "nan", "-1"])
def test_absurd_guidance_is_refused(guidance):
    with pytest.raises(InputError, match=rf"--sampling\.guidance={guidance}: expected"):
        load(SampleRun, "wan_tiny", {"sampling.guidance": guidance})


def test_a_video_that_is_not_finite_is_not_written_and_the_others_stay(finished, model, tmp_path, monkeypatch, rounds):
    whole = pipeline.sample_latents

    def overflow(*arguments, **options):
        latents = whole(*arguments, **options)
        return latents * jnp.nan if len(rounds) == 2 else latents

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sample_latents", overflow)
        with pytest.raises(InputError, match="prompt 1: the latents are not finite"):
            sample(run_of(model, tmp_path / "out"))
    assert sorted(content(tmp_path / "out")) == [".lock", "000.mp4", "config.yaml", "samples.json"]
    sample(run_of(model, tmp_path / "out"))
    assert content(tmp_path / "out") == content(finished)


def test_a_full_disk_leaves_what_is_done(finished, model, tmp_path, monkeypatch):
    write = video.write_clip

    def full(path, *arguments):
        if path.name == "001.mp4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(video, "write_clip", full)
        with pytest.raises(OSError, match="No space left"):
            sample(run_of(model, tmp_path / "out"))
    assert sorted(content(tmp_path / "out")) == [".lock", "000.mp4", "config.yaml", "samples.json"]
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
        patch.setattr(sys, "argv", ["sample.py"])
        with pytest.raises(SystemExit) as ended:
            command.run(lambda _: sample(run))
    assert ended.value.code == 75
    assert len(rounds) == 2
    err = capfd.readouterr().err
    assert "SIGTERM: stopping after this step; send it again to end the program at once" in err
    assert err.splitlines()[-1] == "stopped: 1 of 3 videos are done; the same command continues"
    sample(run)
    assert len(rounds) == 2 + 2
    assert content(tmp_path / "out") == content(finished)


def test_a_signal_before_the_first_step_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_vae", interrupt)
    with pytest.raises(StoppedEarly, match="0 of 3 videos are done"):
        sample(run_of(model, tmp_path / "new" / "out"))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_another_process_writes_to_is_refused(finished, model, tmp_path, rounds):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "001.mp4").unlink()
    with (
        files.lock(tmp_path / "out" / ".lock"),
        pytest.raises(InputError, match=r"sampling\.output=.*another process"),
    ):
        sample(run_of(model, tmp_path / "out"))
    assert not rounds


@pytest.mark.parametrize("output", ["", ".", "/", "file", "full"])
def test_outputs_that_cannot_be(model, tmp_path, monkeypatch, rounds, output):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full", "000.mp4").write_text("mine")
    with pytest.raises(InputError, match=r"sampling\.output=.*expected"):
        sample(run_of(model, Path(output)))
    assert not rounds
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["000.mp4", "file", "full"]


def test_a_damaged_record_is_named(finished, model, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    for text in ("", "{}", '{"run": 1'):
        (tmp_path / "out" / "samples.json").write_text(text)
        with pytest.raises(InputError, match=r"samples\.json: damaged"):
            sample(run_of(model, tmp_path / "out"))


def test_a_field_newer_than_the_record_has_its_default(finished, model, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    record = tmp_path / "out" / "samples.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"guidance": 5.0,', ""), encoding="utf-8")
    sample(run_of(model, tmp_path / "out"))


def test_work_is_told_from_the_start(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "_make", lambda *_: (_ for _ in ()).throw(InputError("enough")))
    with pytest.raises(InputError, match="enough"):
        sample(run_of(model, tmp_path / "out"))
    expected = f"3 prompts, 2 steps each; {model} (4 blocks of width 96, float32); devices: "
    assert capsys.readouterr().err.startswith(expected)


def test_noise_is_a_function_of_seed_and_number(model, tmp_path, rounds):
    """Of nothing else: the other prompts do not change what prompt number n starts from."""

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


def test_rounds_do_not_depend_on_what_is_missing():
    assert pipeline._rounds(5, 2, {0, 1, 2, 3, 4}) == [[0, 1], [2, 3], [4, 4]]
    assert pipeline._rounds(5, 2, {3}) == [[2, 3]]
    assert pipeline._rounds(5, 2, {1, 4}) == [[0, 1], [4, 4]]
    assert pipeline._rounds(2, 4, {1}) == [[0, 1, 1, 1]]


ON_TWO_DEVICES = """
import sys
from pathlib import Path
from tfm_jax.config import load
from tfm_jax.sampling.pipeline import SampleRun, sample

folder = Path(sys.argv[1])
run = load(SampleRun, f"{folder}/finished/config.yaml", {"sampling.output": f"{folder}/two"})
sample(run)
before = {path.name: path.read_bytes() for path in (folder / "two").iterdir()}
(folder / "two" / "001.mp4").unlink()
sample(run)
assert {path.name: path.read_bytes() for path in (folder / "two").iterdir()} == before
"""


def test_two_devices_sample_two_videos_at_a_time(finished, model):
    """The same videos as one device makes, but for rounding, and the same bytes when one is made again."""
    command = [sys.executable, "-c", ON_TWO_DEVICES, model.parent]
    done = subprocess.run(command, env=virtual_devices.environment(2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (
        np.stack([np.float32(video.read_clip(folder / name, 5, 32, 48, 16)) for name in VIDEOS])
        for folder in (finished, model.parent / "two")
    )
    assert np.abs(one - two).mean() <= 0.1 < np.abs(one - np.roll(two, 1, axis=0)).mean()


def test_names_of_many_videos_sort_as_their_numbers(model, tmp_path):
    samples = Samples(run=run_of(model, tmp_path), prompts=["x"] * 1001, weights="", lora=None)
    names = [samples.video(number).name for number in (0, 101, 1000)]
    assert names == ["0000.mp4", "0101.mp4", "1000.mp4"]


def test_digests_of_weights(tmp_path, monkeypatch):
    """Small files are read whole; of large ones, size and pieces from the first to the last byte."""
    monkeypatch.setattr(outputs, "PIECES", 4)
    monkeypatch.setattr(outputs, "PIECE_BYTES", 10)
    file = tmp_path / "weights"

    def digest(data: bytes) -> str:
        file.write_bytes(data)
        return digest_weights([file])

    for size, noticed in ((40, range(40)), (37, range(37)), (400, [0, 9, 130, 139, 260, 390, 399])):
        whole = bytes(size)
        changed = [whole[:n] + b"x" + whole[n + 1 :] for n in noticed]
        assert len({digest(data) for data in [whole, *changed, whole + b"\0"]}) == len(changed) + 2


def test_the_configuration_of_a_training_run_will_do(model, tmp_path):
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
