"""Training runs: resuming, their length, and the folder of a run."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.configured import configured
from helpers.lora_files import official_file
from helpers.training_runs import CLIP, CONFIG, assert_same, computed, saved, start, write_latents
from helpers.wan_reference import reference_transformer

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.config import ClipConfig, OptimizerConfig, TrainConfig
from tfm_jax.errors import CompilerError, InputError, StoppedEarly, Terminated
from tfm_jax.files import lock
from tfm_jax.lora.files import read_lora
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.train import loop
from tfm_jax.train.export import export
from tfm_jax.train.metrics import read_metrics
from tfm_jax.train.run import TrainRun, check_same_run, config_dict
from tfm_jax.wan.names import BlockLinear

# --- Resuming --------------------------------------------------------------------------------------------------------


def test_resuming_changes_no_bit(options, model_folder, stopped, tmp_path, capsys):
    """Even if metrics.jsonl has lines from after the last checkpoint, the last of which was cut off."""
    whole = start([*options, f"--train.output={tmp_path}/whole"])
    with open(stopped / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "loss": 7}\n{"step": 4, "los')
    start(options, resume=True)
    assert_same(saved(whole, 4), saved(stopped, 4))
    lines = computed(whole)
    assert lines == computed(stopped)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert len({line["loss"] for line in lines}) == 4
    assert [line["learning_rate"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])

    out = capsys.readouterr().out.splitlines()
    first, second = out[: len(out) // 2], out[len(out) // 2 :]
    assert first[:6] == [
        f"training a LoRA in {whole}: 4 steps, batches of 2",
        "devices: 1 x cpu; mesh: data=1, fsdp=1, sequence=1, tensor=1",
        f"note: {model_folder} has no vae and no text_encoder, so nothing could be compared with that of the clips",
        f"data: 12 clips in {options_data(options)}, latents 3 x 4 x 6 x 16",
        "model: 402,904 parameters in the base, 24,000 in the adapters",
        f"started {whole}",
    ]
    assert second[5] == f"resumed {stopped} after step 2"
    for lines in first, second:
        assert lines[6] == "compiling the training step for latents 3 x 4 x 6 x 16 ..."
        assert re.fullmatch(r"compiled in \d+\.\d s", lines[7])
        assert len(lines) == 8


def test_clips_of_two_sizes(options, tmp_path, capsys):
    """The step is compiled for both sizes, and resuming changes no bit."""
    write_latents(tmp_path / "two", seed=2, sizes=((3, 4, 6), (1, 4, 4)), dtype="bfloat16")
    options = [*options, f"--data.path={tmp_path}/two", "--data.caption_dropout=0.5", "--objective.kind=fm"]
    whole = start([*options, f"--train.output={tmp_path}/whole"])
    out = capsys.readouterr().out
    assert "two, latents 3 x 4 x 6 x 16 (6), 1 x 4 x 4 x 16 (6)\n" in out
    sizes = re.findall("compiling the training step for latents (.*) ...", out)
    assert sizes == ["3 x 4 x 6 x 16 (1 of 2)", "1 x 4 x 4 x 16 (2 of 2)"]
    parts = start([*options, "--train.steps=2"])
    start(options, resume=True)
    assert_same(saved(whole, 4), saved(parts, 4))
    assert computed(parts) == computed(whole)


def test_a_size_that_cannot_be_compiled_stops_the_run_before_its_first_step(options, tmp_path, monkeypatch):
    write_latents(tmp_path / "two", seed=2, sizes=((3, 4, 6), (1, 4, 4)))

    class Program:
        def lower(self, state, frozen, batch):
            assert (batch.latents.dtype, batch.text.shape[:2]) == (np.float32, (2, 512))
            self.latents = batch.latents.shape
            return self

        def compile(self):
            if self.latents == (2, 1, 4, 4, 16):
                raise jax.errors.JaxRuntimeError("out of\nmemory")
            return lambda *_: pytest.fail("a step was computed")

    monkeypatch.setattr(loop, "make_step", lambda *_: Program())
    with pytest.raises(CompilerError, match="the training step for latents 1 x 4 x 4 x 16 failed: out of memory"):
        start([*options, f"--data.path={tmp_path}/two"])


def options_data(options: list[str]) -> str:
    return str(configured(TrainRun, options).data.path)


def test_the_base_is_not_saved_and_the_adapters_change(two_steps):
    one, two = saved(two_steps, 1), saved(two_steps, 2)
    assert all(name.startswith(("lora/", "optimizer/")) or name in ("step", "bad_steps") for name in one)
    assert not any("kernel" in name or "bias" in name for name in one)
    assert all((one[name] != two[name]).any() for name in one if name.startswith("lora/"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--lora.rank=8", "lora.rank=8: the run in .* was started with 4"),
        ("--model.quantize=int8", "model.quantize=int8: the run in .* was started with null"),
        ("--train.seed=1", "train.seed=1"),
        (
            "--train.batch_size=4",
            "train.batch_size=4, train.accumulate=1: the run in .* with 2 clips per step; expected",
        ),
        (
            "--train.accumulate=2",
            "train.batch_size=2, train.accumulate=2: the run in .* with 2 clips per step; expected",
        ),
        ("--train.ema_decay=0.9", "train.ema_decay=0.9: the run in .* was started with null"),
        ("--optimizer.schedule=linear", "optimizer.schedule=linear: the run in .* was started with constant"),
        ("--objective.rho=5", "objective.rho=5"),
        ("--data.held_out=0.1", "data.held_out=0.1"),
        ("--data.caption_dropout=0.1", "data.caption_dropout=0.1"),
    ],
)
def test_resuming_as_another_run_is_refused(options, stopped, monkeypatch, change, message):
    """Before the base is loaded, which can take minutes."""
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(InputError, match=message):
        start([*options, change], resume=True)


def test_resuming_on_other_weights_is_refused(options, stopped, tmp_path):
    reference_transformer(CONFIG, seed=5).save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(InputError, match="not the base weights"):
        start([*options, f"--model.path={tmp_path}/other"], resume=True)


def test_resuming_on_other_clips_is_refused(options, stopped, tmp_path, monkeypatch):
    """The other clips have the same number and sizes."""
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("the base was loaded"))
    write_latents(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="not the clips that the run in"):
        start([*options, f"--data.path={tmp_path}/other"], resume=True)


def test_resuming_after_the_last_step_is_no_error(options, stopped, capsys):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    start([*options, "--train.steps=2"], resume=True)
    assert capsys.readouterr().out.endswith(f"{stopped} is complete: it has 2 steps, and train.steps=2\n")
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_fields_that_a_saved_configuration_lacks_have_their_defaults(options):
    """A checkpoint of an earlier version lacks new fields. An unknown field is reported."""
    run = configured(TrainRun, options)
    now = {"config": config_dict(run), "base": "b", "data": "d"}
    saved = json.loads(json.dumps(now))
    del saved["config"]["objective"]["beta"], saved["config"]["optimizer"]
    now["config"]["optimizer"] = config_dict(dataclasses.replace(run, optimizer=OptimizerConfig()))["optimizer"]
    check_same_run(saved, now, run)
    now["config"]["objective"]["beta"] = 0.5
    with pytest.raises(InputError, match=r"objective.beta=0.5: the run in .* was started with 1.0"):
        check_same_run(saved, now, run)
    now["config"]["objective"]["beta"] = 1.0
    now["config"]["train"] |= {"steps": 9, "batch_size": 1, "accumulate": 2}
    check_same_run(saved, now, configured(TrainRun, [*options, "--train.batch_size=1", "--train.accumulate=2"]))
    saved["config"]["lora"]["dropout"] = 0.1
    with pytest.raises(InputError, match=r"checkpoints: lora.dropout=0.1: expected a field of this version"):
        check_same_run(saved, now, run)


def test_a_falling_learning_rate_needs_the_same_number_of_steps(options):
    run = configured(TrainRun, [*options, "--optimizer.schedule=cosine"])
    saved = {"config": config_dict(run), "base": "b", "data": "d"}
    check_same_run(saved, saved, run)
    longer = configured(TrainRun, [*options, "--optimizer.schedule=cosine", "--train.steps=5"])
    with pytest.raises(InputError, match=r"train.steps=5: the run in .* was started with 4; expected the same value"):
        check_same_run(saved, saved | {"config": config_dict(longer)}, longer)


# --- The length of a run, and what is kept of it ---------------------------------------------------------------------


def test_epochs_accumulation_and_what_is_kept(options, tmp_path, capsys):
    """Two epochs of 12 clips in steps of 2 x 4 clips: 3 steps. The moving average is that of the saved adapters, which
    are those of a DoRA."""
    more = ["--train.steps=null", "--train.epochs=2", "--train.batch_size=2", "--train.accumulate=4"]
    more += ["--train.keep_checkpoints=1", "--train.keep_every=2", "--train.ema_decay=0.2"]
    more += ["--objective.kind=fm", "--lora.dora=true"]
    run = start([*options, *more, "--train.checkpoint_every=2"])
    out = capsys.readouterr().out
    assert f"training a LoRA in {run}: 2 epochs, batches of 2 x 4\n" in out
    assert "train.epochs=2: 3 steps, for 12 clips, 8 per step\n" in out
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert Checkpoints(run / "checkpoints").steps == [2, 3]

    two, three = saved(run, 2), saved(run, 3)
    averages = [name for name in three if name.startswith("ema/")]
    assert len(averages) == 30
    for name in averages:
        assert (two[name] != three[name]).any()
        expected = 0.2 * two[name] + 0.8 * three[name.replace("ema/", "lora/")]  # 3 / 12 is above 0.2
        np.testing.assert_allclose(three[name], expected, rtol=1e-5, atol=1e-8)
    for ema, part in ((True, "ema"), (False, "lora")):
        export(run, tmp_path / part, "diffusers", np.dtype(np.float32), ema=ema)
        lora, q = read_lora(tmp_path / part), BlockLinear(1, "self_attn.q")
        np.testing.assert_array_equal(lora.adapters[q].a, three[f"{part}/blocks/self_attn/q/lora_a/value"][1].T)
        np.testing.assert_array_equal(lora.magnitudes[q], three[f"{part}/blocks/self_attn/q/lora_magnitude/value"][1])
        assert lora.metadata["dora"] == "True"
    start([*options, *more, "--train.checkpoint_every=2"], resume=True)
    assert capsys.readouterr().out.endswith("is complete: it has 3 steps, and train.epochs=2 needs 3\n")


def test_a_run_that_starts_from_the_lora_of_the_release(options, tmp_path, capsys):
    """Its adapters are those of the file before the first step; a resumed run needs the same file."""
    options = [*options, "--objective.kind=fm", "--optimizer.learning_rate=1e-30", "--optimizer.weight_decay=0"]
    file, moved = tmp_path / "lora.safetensors", tmp_path / "moved.safetensors"
    official_file(file, CONFIG.layers, CONFIG.dim, CONFIG.ffn_dim, rank=4)
    run = start([*options, f"--lora.init={file}", "--train.steps=1"])
    assert f"adapters: 30 from {file}\n" in capsys.readouterr().out
    ours = saved(run, 1)
    assert len([name for name in ours if name.startswith("lora/")]) == 20
    for linear, adapter in read_lora(file).adapters.items():
        path = linear.ours.replace(".", "/")
        for name, factor in (("lora_a", adapter.a), ("lora_b", adapter.b)):
            np.testing.assert_array_equal(ours[f"lora/{path}/{name}/value"][linear.layer], factor.T)

    file.rename(moved)
    start([*options, f"--lora.init={moved}", "--train.steps=1"], resume=True)
    with pytest.raises(InputError, match=r"lora.init=null: this is not the LoRA file that the run in .* started with"):
        start([*options, "--train.steps=2"], resume=True)
    with pytest.raises(InputError, match=r"lora.init=.*: the LoRA has rank 4; the configuration gives .* rank 2"):
        start([*options, f"--lora.init={moved}", "--lora.rank=2", f"--train.output={tmp_path}/other"])
    assert not (tmp_path / "other").exists()


def test_a_run_without_a_moving_average_has_none_to_export(two_steps, tmp_path):
    with pytest.raises(
        InputError, match=r"was trained with train.ema_decay=null; expected a run with a moving average"
    ):
        export(two_steps, tmp_path / "lora.safetensors", "comfy", np.dtype(np.float32), ema=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "clips", "steps"),
    [
        ({"steps": 5}, 100, 5),
        ({"epochs": 1, "batch_size": 4}, 12, 3),
        ({"epochs": 1, "batch_size": 4}, 13, 4),
        ({"epochs": 3, "batch_size": 4}, 13, 10),
        ({"epochs": 2, "batch_size": 2, "accumulate": 4}, 12, 3),
    ],
)
def test_steps_follow_from_epochs(options, clips, steps):
    assert TrainConfig(output=Path("run"), **options).number_of_steps(clips) == steps


# --- The folder of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_has_one_run_at_a_time(options, stopped, resume):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with lock(stopped / ".lock"), pytest.raises(InputError, match=rf"train.output={stopped}: another run is using"):
        start(options, resume)
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_another_run_takes_the_new_folder_meanwhile(options, tmp_path, monkeypatch):
    with contextlib.ExitStack() as held:

        def load(*arguments):
            held.enter_context(lock(tmp_path / "run" / ".lock"))
            return load_base(*arguments)

        load_base = loop.load_base
        monkeypatch.setattr(loop, "load_base", load)
        with pytest.raises(InputError, match="another run is using"):
            start(options)


def test_a_folder_with_a_checkpoint_needs_resume(options, stopped):
    with pytest.raises(InputError, match=r"already contains a run; pass --resume to continue it"):
        start(options)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(options, tmp_path, monkeypatch, resume):
    output = tmp_path / "run"
    (output / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    for name in (".lock", "config.yaml", "metrics.jsonl"):
        (output / name).write_text("")
    started = []
    monkeypatch.setattr(loop, "_compile", lambda setup, state: started.append(int(state.step)) or setup.step)
    monkeypatch.setattr(loop, "_loop", lambda *arguments: None)
    start(options, resume)
    assert started == [0]


def test_folders_that_cannot_be_the_folder_of_a_run(options):
    for path, output, data in (
        ("", "--train.output=: expected a path", "--data.path=: expected a path"),
        (
            ".",
            "train.output=.: expected the path of a folder",
            ".: contains no .* a folder that tfm-prepare wrote",
        ),
        (
            "/",
            "train.output=/: expected the path of a folder",
            "/: contains no .* a folder that tfm-prepare wrote",
        ),
    ):
        with pytest.raises(InputError, match=f"^{output}"):
            start([*options, f"--train.output={path}"])
        with pytest.raises(InputError, match=f"^{data}"):
            start([*options, f"--data.path={path}"])


def test_clips_prepared_with_other_settings_are_refused(options):
    with pytest.raises(InputError, match=r"clip.frames=81: data.path=.* was prepared with 9; expected the same"):
        start([*options, "--clip.frames=81"])
    with pytest.raises(
        InputError, match=r"clip.buckets=\[\[9, 32, 32\]\]: data.path=.* was prepared with \[\]; expected"
    ):
        start([*options, "--clip.buckets=[[9, 32, 32]]"])


def test_the_saved_configuration_can_be_used_for_sampling(options, two_steps, tmp_path):
    file = ["--config", str(two_steps / "config.yaml")]
    sampling = configured(SampleRun, [*file, f"--sampling.output={tmp_path}"])
    assert sampling.clip == ClipConfig(**CLIP)
    run = configured(TrainRun, [*options, f"--train.output={two_steps}", "--train.steps=2"])
    assert configured(TrainRun, file) == run
    assert "source" not in (two_steps / "config.yaml").read_text()


@pytest.mark.parametrize(("signal", "name"), [(KeyboardInterrupt, "SIGINT"), (Terminated, "SIGTERM")])
def test_a_signal_before_the_first_step(options, monkeypatch, signal, name):
    def load(*arguments):
        raise signal

    monkeypatch.setattr(loop, "load_base", load)
    with pytest.raises(StoppedEarly, match=f"stopped by {name} while preparing to train; run the same command again"):
        start(options)
