"""Watchers of a run: the interface, validation, trackers and the profiler."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.configured import configured
from helpers.training_runs import computed, start, validated
from tensorboardX.proto.event_pb2 import Event as TensorBoardEvent

from tfm_jax.data.records import open_records
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import attach_lora, init_lora, split_lora
from tfm_jax.objective import temporal_loss, temporal_path
from tfm_jax.sharding import one_device_mesh
from tfm_jax.train.profiling import Profile
from tfm_jax.train.run import TrainRun
from tfm_jax.train.trackers import TensorBoard, Wandb
from tfm_jax.train.validation import LEVELS, Validation, _batches, _spread
from tfm_jax.train.watching import About, Event, Reports, Watcher
from tfm_jax.wan import load_base
from tfm_jax.wan.transformer import WanTransformer

# --- The interface ---------------------------------------------------------------------------------------------------


class Recorder(Watcher):
    """Records every call, and looks at the model after step 2."""

    def __init__(self):
        self.calls = []

    def open(self, about):
        self.calls.append(("open", about.first, about.last))

    def on_event(self, event):
        self.calls.append((event.kind, event.step))
        if event.kind == "step":
            assert event.values["seconds"] > 0

    def wants(self, step):
        return step == 2

    def look(self, step, model):
        trained = split_lora(model).lora["blocks"]["ffn"]["up"]["lora_b"][...]
        self.calls.append(("look", step, bool((trained != 0).any())))
        return [Event("seen", step)]

    def close(self):
        self.calls.append("close")


FM = ["--objective.kind=fm"]  # compiles faster


def test_a_run_with_watchers_is_resumed(options, tmp_path, capsys, monkeypatch):
    """One of them is the user's, one fails; validation is the same as without the interruption."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # the import fails
    options = [*options, *FM, "--data.held_out=0.3", "--train.eval_every=2", "--train.eval_clips=3"]
    options += ["--train.checkpoint_every=9", "--train.wandb=films"]
    whole, stopped = tmp_path / "whole", tmp_path / "run"
    recorder = Recorder()
    start([*options, f"--train.output={whole}"], watchers=[recorder])
    steps = [("step", n) for n in (1, 2, 3, 4)]
    assert recorder.calls == [
        ("open", 0, 4), ("started", 0), ("validation", 0), *steps[:2], ("validation", 2), ("look", 2, True),
        ("seen", 2), *steps[2:], ("checkpoint", 4), ("validation", 4), ("finished", 4), "close",
    ]  # fmt: skip
    err = capsys.readouterr().err
    assert err.count("note: train.wandb=films: ") == 1
    assert "training goes on without W&B" in err
    assert "validation of the base  fm " in err

    start([*options, "--train.steps=2"])
    with open(stopped / "validation.jsonl", "a") as stream:
        stream.write('{"step": 4, "model": "lora", "loss": {}}\n{"step": 4, "mod')
    start(options, resume=True)
    assert validated(stopped) == validated(whole)
    assert computed(stopped) == computed(whole)
    lines = validated(whole)
    assert [(line["model"], line["step"]) for line in lines] == [("base", 0), ("lora", 2), ("lora", 4)]
    assert lines[0]["loss"] != lines[1]["loss"] != lines[2]["loss"]
    events = [json.loads(line)["event"] for line in (stopped / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "checkpoint", "finished", "resumed", "checkpoint", "finished"]
    values = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"seconds", "clips_per_second", "data_wait", "tflops", "update_norm", "loss_by_level"} <= values.keys()
    found = [level for level in values["loss_by_level"] if level is not None]
    assert len(values["loss_by_level"]) == 10
    assert len(found) in (1, 2)  # of two clips
    assert np.mean(found) == pytest.approx(values["mse"], rel=1e-5)


# --- Validation ------------------------------------------------------------------------------------------------------


def test_validation_equals_a_computation_by_hand(options, model_folder, tmp_path):
    """Three clips in batches of two, on the LoRA and the base."""
    settings = ["--data.held_out=0.6", "--train.eval_every=1", "--train.eval_clips=3", "--objective.rho=3"]
    run = configured(TrainRun, [*options, *settings, "--objective.beta=0.5"])
    records, mesh = open_records(run.data.path), one_device_mesh()
    validation = Validation(run, records, mesh)
    validation.open(About(tmp_path, 0, 1, 2))
    model = load_base(run.model, mesh)
    attach_lora(model, run.lora)
    init_lora(model, jax.random.key(1), mesh)
    lora = split_lora(model).lora
    for path in lora["blocks"]["ffn"].values():
        path["lora_b"].set_value(jnp.full_like(path["lora_b"][...], 0.1))
    assert validation.wants(0)
    assert validation.wants(1)
    base, tuned = (event.values for event in validation.look(1, model))
    assert (base["model"], tuned["model"]) == ("base", "lora")
    assert not validation.wants(1)
    assert tuned["clips"] == 3

    held_out = [n for n, entry in enumerate(records.index) if n in validation._clips]
    clean = jnp.stack([records[n].latents for n in held_out])
    text = jnp.stack([np.pad(records[n].text, ((0, 512 - len(records[n].text)), (0, 0))) for n in held_out])
    for level in (2, 7):
        sigma = jnp.full(3, LEVELS[level], jnp.float32)
        keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), n), level) for n in held_out]
        noise = jnp.stack([jax.random.normal(key, clean.shape[1:]) for key in keys])
        straight = (1 - LEVELS[level]) * clean + LEVELS[level] * noise
        fm = jnp.mean((model(straight, 1000 * sigma, text) - (noise - clean)) ** 2)
        assert tuned["by_level"]["fm"][level] == pytest.approx(float(fm), rel=1e-4)
        x_t = temporal_path(clean, noise, sigma, 3.0).x_t
        direction, residual = temporal_loss(model(x_t, 1000 * sigma, text), clean, noise, x_t, 3.0)
        tfm = float(jnp.mean(direction + 0.5 * residual))
        assert tuned["by_level"]["tfm"][level] == pytest.approx(tfm, rel=1e-3)
    for kind in ("fm", "tfm"):
        assert tuned["loss"][kind] == pytest.approx(np.mean(tuned["by_level"][kind]))
        assert tuned["loss"][kind] != base["loss"][kind]
    plain = load_base(run.model, mesh)
    assert base["by_level"]["fm"][7] == pytest.approx(
        float(jnp.mean((plain(straight, 1000 * sigma, text) - (noise - clean)) ** 2)), rel=1e-4
    )
    validation.close()


def test_validation_needs_held_out_clips(options):
    with pytest.raises(
        InputError, match=r"train.eval_every=2: data.held_out=0.0 holds out no clip of .*expected at le"
    ):
        start([*options, "--train.eval_every=2"])


def test_batches_of_validation_have_one_size_and_no_more_rows_than_needed():
    shapes = {n: (1, 4, 4, 4) if n % 3 == 2 else (1, 2, 2, 4) for n in range(9)}
    assert _spread(list(shapes), 4) == [0, 2, 4, 6]
    assert _batches(shapes, 4, 2) == [([0, 1, 3, 4], 4), ([6, 7, 7, 7], 2), ([2, 5, 8, 8], 3)]
    assert _batches({n: shapes[n] for n in (0, 2, 3)}, 8, 2) == [([0, 3], 2), ([2, 2], 1)]


# --- Trackers --------------------------------------------------------------------------------------------------------

STEP = Event("step", 3, {"loss": 0.5, "grad_norm": float("nan"), "loss_by_level": [0.5, 1.0]})
EVALUATION = Event("validation", 2, {"model": "lora", "loss": {"fm": 0.25}, "by_level": {}, "clips": 1})


def test_tensorboard_files(tmp_path):
    with Reports([TensorBoard()], About(tmp_path, 0, 4, 2)) as reports:
        reports.tell(STEP)
        reports.tell(EVALUATION)
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found = file.read_bytes(), []
    while content:  # length, its checksum, an event, its checksum
        length = int.from_bytes(content[:8], "little")
        event = TensorBoardEvent.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    assert found == [("train/loss", 3, 0.5), ("validation/lora/fm", 2, 0.25)]


def test_tensorboard_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"train.tensorboard=true: tensorboardX is not installed; .* pip install tens"):
        TensorBoard()


class FakeWandb(SimpleNamespace):
    """Records what is sent, and fails at step 4."""

    def __init__(self):
        super().__init__(Video=lambda file: Path(file).name)
        self.sent, self.options = [], []

    def init(self, **options):
        self.options.append((options["project"], options["id"], options["resume"]))
        return self

    def log(self, values, step):
        if step == 4:
            raise ConnectionError("no network")
        self.sent.append((step, values))

    def finish(self):
        self.sent.append("finish")


def test_wandb_gets_metrics_and_samples_until_it_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "000.mp4").touch()
    for events in (
        [STEP, EVALUATION, Event("samples", 3, {"folder": str(tmp_path / "step")})],
        [STEP._replace(step=4)],
    ):
        with Reports([Wandb("films")], About(tmp_path, 0, 9, 2)) as reports:
            for event in events * 2:
                reports.tell(event)
    sent = [(3, {"train/loss": 0.5}), (2, {"validation/lora/fm": 0.25}), (3, {"samples/000": "000.mp4"})]
    assert fake.sent == [*sent, *sent, "finish"]
    identifier = (tmp_path / ".wandb_id").read_text()
    assert fake.options == [("films", identifier, "allow")] * 2
    assert capsys.readouterr().err == "note: train.wandb=films: no network; training goes on without W&B\n"


# --- The profiler ----------------------------------------------------------------------------------------------------


def test_the_profiler_traces_some_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profile, model = Profile("3:4"), object.__new__(WanTransformer)
    profile.open(About(tmp_path, 1, 9, 2))
    for step in range(1, 10):
        if profile.wants(step):
            calls.append(step)
            assert not list(profile.look(step, model))
    assert calls == [2, tmp_path / "profile", 4, "stop"]


@pytest.mark.parametrize("steps", ["4", "4:3", "0:2", "a:b"])
def test_steps_that_cannot_be_profiled(steps):
    with pytest.raises(InputError, match=f"--profile={steps}: expected the first and the last step, such as 10:13"):
        Profile(steps)


def test_steps_that_the_run_does_not_have(tmp_path):
    with pytest.raises(InputError, match=r"--profile=3:9: this run computes the steps 3 to 8; expected some of them"):
        Profile("3:9").open(About(tmp_path, 2, 8, 2))
