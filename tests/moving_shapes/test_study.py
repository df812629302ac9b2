"""The study: its sensitivity, results file, runs and options, and a small study from beginning to end."""

import itertools
import json
import re
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_study import METRICS, make_small_study, small_options, write_config
from helpers.tiny_world import execute
from jax.tree_util import Partial
from PIL import Image

from tfm_jax.data.metadata import read_metadata
from tfm_jax.errors import InputError, NonFiniteLoss, StoppedEarly
from tfm_jax.moving_shapes.study import clips, protocol, runs
from tfm_jax.moving_shapes.study.plan import Run, planned_runs
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.moving_shapes.study.sensitivity import measure_sensitivity

# --- Order of frames -------------------------------------------------------------------------------------------------


def test_sensitivity_is_to_the_order_of_frames():
    """A network that knows the value of every frame is sensitive; a constant one is not."""
    ramp = np.arange(4, dtype=np.float32)[None, :, None, None, None]
    clips = np.broadcast_to(ramp, (6, 4, 2, 2, 3)).copy()
    text = np.zeros((6, 1, 2), np.float32)

    def knows(x, timestep, text):
        return (x - ramp) / (timestep / 1000)[:, None, None, None, None]

    found = measure_sensitivity(Partial(knows), clips, text, seed=0)
    assert len(found["ordered"]) == len(found["permuted"]) == len(protocol.SIGMAS)
    np.testing.assert_allclose(found["ordered"], 0, atol=1e-8)
    assert min(found["permuted"]) > 0.5
    blind = measure_sensitivity(Partial(lambda x, timestep, text: jnp.zeros_like(x)), clips, text, seed=0)
    np.testing.assert_allclose(blind["permuted"], blind["ordered"], rtol=0.1)
    assert blind["permuted"] != blind["ordered"]
    assert blind == measure_sensitivity(Partial(lambda x, timestep, text: jnp.zeros_like(x)), clips, text, seed=0)


# --- The file of results ---------------------------------------------------------------------------------------------


def test_results_continue_after_an_incomplete_line(tmp_path):
    file = tmp_path / "results.jsonl"
    settings = {"size": {"clips": 4}, "weights": "abc"}
    results = Results(file, settings)
    results.add("run", arm="fm", seed=0, metrics={"residual": 0.5})
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"kind": "run", "arm": "tf')
    again = Results(file, settings)
    assert again.records == results.records
    assert again.one("run", arm="fm", seed=0)["metrics"] == {"residual": 0.5}
    assert again.one("run", arm="tfm") == {}
    added = again.add("run", arm="tfm", seed=0)
    assert file.read_bytes() == whole + json.dumps(added).encode() + b"\n"
    assert [run["arm"] for run in Results(file, settings).all("run", seed=0)] == ["fm", "tfm"]


def test_results_that_another_process_adds_are_kept(tmp_path):
    """Even after a second process has started and found an incomplete line."""
    file = tmp_path / "results.jsonl"
    first = Results(file, {"weights": "abc"})
    first.add("run", arm="base")
    with open(file, "a", encoding="utf-8") as stream:
        stream.write('{"kind": "ru')
    second = Results(file, {"weights": "abc"})
    first.add("run", arm="fm")
    second.add("run", arm="tfm")
    second.reload()
    assert [run["arm"] for run in second.all("run")] == ["base", "fm", "tfm"]


def test_two_processes_may_start_at_once(tmp_path):
    file = tmp_path / "results.jsonl"
    first, second = (Results(file, {"weights": "abc"}) for _ in range(2))
    assert not file.exists()
    first.add("run", arm="fm")
    second.add("run", arm="tfm")
    assert [line["kind"] for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())] == [
        "settings", "run", "run",
    ]  # fmt: skip


def test_results_of_another_study_are_refused(tmp_path):
    file = tmp_path / "results.jsonl"
    Results(file, {"size": {"clips": 4}, "weights": "abc"}).add("run", arm="fm")
    with pytest.raises(InputError, match=r"a study with size\.clips=4, not 5; choose another --docs"):
        Results(file, {"size": {"clips": 5}, "weights": "abc"})


@pytest.mark.parametrize(
    "content",
    [b'{"step": 1}\n', b"\xff\xfe\n", b"[1]\n", b"5\n", b'{"kind": "settings"}\n[1]\n', b"[" * 9999 + b"\n"],
)
def test_files_that_hold_no_results_are_refused(tmp_path, content):
    file = tmp_path / "results.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match="is not the results file of a study"):
        Results(file, {})
    assert file.read_bytes() == content


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, str, int]]:
    """Replace all work, and return the list of (law, arm, seed) that were trained."""
    done = []

    def train(run, resume):
        assert resume
        law, arm, name = run.train.output.parts[-3:]
        done.append((law, arm, int(name.rpartition("seed")[2])))
        for step in range(run.train.checkpoint_every, run.train.steps + 1, run.train.checkpoint_every):
            (run.train.output / "checkpoints" / str(step)).mkdir(parents=True)

    def export(folder, file, dialect, dtype, step):
        assert (folder / "checkpoints" / str(step)).exists()
        file.write_text("", encoding="utf-8")

    def measure(study, world, lora, seed, folder):
        folder.mkdir(parents=True)
        return dict.fromkeys(METRICS, 1.0)

    monkeypatch.setattr(runs, "make_world", lambda study, law: clips.World(Path("x"), [], (), Path("y"), []))
    monkeypatch.setattr(runs, "measure_autoencoder", lambda *_: {"prompts": []})
    monkeypatch.setattr(runs, "measure_order", lambda *_: {"ordered": [1.0] * 9, "permuted": [2.0] * 9})
    monkeypatch.setattr(runs, "_costs", lambda study, world: {arm: [1.0] for arm in study.size.arms})
    for name, function in (("train", train), ("export", export), ("measure_samples", measure)):
        monkeypatch.setattr(runs, name, function)
    return done


def test_the_deciding_runs_go_first_and_some_arms_are_run_on_the_first_law_only(config, tmp_path):
    study = make_small_study(tmp_path, config, seeds=2)
    order = [(run.seed, run.law, run.arm) for run in planned_runs(study)]
    deciding = [(law, arm) for law in ("gravity", "returning") for arm in ("base", "fm", "tfm")]
    others = [("gravity", "tfm_mse"), ("gravity", "tfm_rho2"), ("returning", "tfm_mse")]
    assert order == [(seed, *each) for part in (deciding, others) for seed in (0, 1) for each in part]


def test_a_run_trains_once_and_is_measured_after_every_length(config, tmp_path, trained):
    study = make_small_study(tmp_path, config, seeds=2, lengths=(10, 15, 40))
    results = runs.run_study(study)
    assert len(trained) == len(set(trained)) == 14
    lengths = [run["steps"] for run in results.all("run", law="returning", arm="tfm", seed=1)]
    assert lengths == [10, 15, 40]
    measured = ["sensitivity" in run for run in results.all("run", law="returning", arm="tfm", seed=1)]
    assert measured == [False, False, True]
    kept = {path.parent.parent.name for path in study.output.rglob("samples_step40")}
    assert {path.parts[-2] for path in study.output.rglob("samples_step40")} == {"rate0.001_seed0"}
    assert kept == {"fm", "tfm", "tfm_mse", "tfm_rho2"}
    assert not list(study.output.rglob("checkpoints"))
    size = study.results.stat().st_size
    runs.run_study(study)
    assert study.results.stat().st_size == size


def test_the_results_are_enough_to_continue(config, tmp_path, trained, monkeypatch):
    study = make_small_study(tmp_path / "one", config, seeds=2)
    train = runs.train

    def stop(run, resume):
        if len(trained) == 5:
            raise StoppedEarly("stopped by SIGINT after step 3; to continue, run the same command with --resume")
        train(run, resume)

    monkeypatch.setattr(runs, "train", stop)
    message = r"stopped: 8 of 18 runs are done; to continue, run the same command again$"
    with pytest.raises(StoppedEarly, match=message):
        runs.run_study(study)
    monkeypatch.setattr(runs, "train", train)
    before = list(trained)

    other = make_small_study(tmp_path / "other", config, seeds=2)
    other.results.parent.mkdir(parents=True)
    shutil.copy(study.results, other.results)
    results = runs.run_study(other)
    assert not set(before) & set(trained[len(before) :])  # nothing is repeated
    assert all(run.is_done(results) for run in planned_runs(other))
    assert len(results.all("cost")) == len(results.all("power")) == 1


@pytest.mark.parametrize("measuring", [True, False])
def test_signals_at_any_time_leave_a_study_that_continues(config, tmp_path, trained, monkeypatch, measuring):
    def interrupted(*_):
        raise KeyboardInterrupt

    study = make_small_study(tmp_path, config, seeds=2)
    monkeypatch.setattr(runs, "measure_order" if measuring else "make_world", interrupted)
    with pytest.raises(StoppedEarly, match="stopped: 0 of 18 runs are done"):
        runs.run_study(study)


def test_a_run_that_diverges_is_measured_at_the_lengths_that_it_reached(config, tmp_path, trained, monkeypatch):
    train = runs.train

    def diverge(run, resume):
        train(run, resume)
        if run.train.seed == 1 and run.objective.kind == "tfm_mse":
            shutil.rmtree(run.train.output / "checkpoints" / "30")
            raise NonFiniteLoss("step 17: the loss is not finite")

    monkeypatch.setattr(runs, "train", diverge)
    results = runs.run_study(make_small_study(tmp_path, config, seeds=2))
    first, second = results.all("run", law="returning", arm="tfm_mse", seed=1)
    assert first["metrics"]["residual"] == 1.0
    assert (second["steps"], second["diverged"]) == (30, "step 17: the loss is not finite")


def test_the_pilot_trains_plain_flow_matching_with_other_seeds(config, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(protocol, "PILOT_LENGTHS", (10, 20))
    monkeypatch.setattr(protocol, "PILOT_LEARNING_RATES", (1e-3, 1e-2))
    study = make_small_study(tmp_path, config)
    pilot = runs.run_pilot(study)
    assert {arm for _, arm, _ in trained} == {"fm"}
    assert {seed for _, _, seed in trained} == set(protocol.PILOT_SEEDS)
    assert len(pilot.all("run", arm="fm")) == 2 * 2 * 2 * 2
    assert not study.results.exists()
    assert not list(study.output.rglob("samples_step*"))
    assert len(runs.run_study(study).one("power")["differences"]) == 4  # of the length that the pilot has


def test_prompts_are_captions_that_no_training_clip_has(config, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "_make_latents", lambda study, source: source)
    monkeypatch.setattr(clips, "open_records", lambda folder: [])
    study = make_small_study(tmp_path, config, clips=100, prompts=40, reference=4)
    world = clips.make_world(study, "gravity")
    prompts = world.prompts.read_text(encoding="utf-8").splitlines()
    held_out = [clip.prompt for clip in read_metadata(study.output / "gravity" / "held_out")]
    assert len(set(prompts)) == 40
    assert [held_out[number] for number in world.numbers] == prompts
    training = [clip.prompt for clip in read_metadata(study.output / "gravity" / "clips")]
    assert len(training) == 100
    assert not set(prompts) & set(training)
    with pytest.raises(InputError, match=r"settings\.json: belongs to a study with size\.clips=100, not 50; choose"):
        clips.make_world(make_small_study(tmp_path, config, clips=50, prompts=40, reference=4), "gravity")


# --- Options ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    return small_options(tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--arms=[tfm]", "--arms=tfm: expected fm among them"),
        ("--arms=[fm, mse]", "--arms=mse: expected one of fm, "),
        ("--seeds=1", "--seeds=1: expected at least 2"),
        ("--laws=[falling]", "--laws=falling: expected one of still, "),
        ("--laws=[returning, returning]", "--laws=[returning, returning]: expected different laws"),
        ("--lengths=[3, 2]", "--lengths=[3, 2]: expected growing numbers of steps"),
        ("--lengths=[]", "--lengths=[]: expected growing numbers of steps"),
        ("--learning_rate=0", "--learning_rate=0: expected more than 0"),
        ("--clips=1", "--clips=1: expected at least 2"),
        ("--train.steps=3", "--train.steps=3: the study sets this field"),
        ("--optimizer.learning_rate=3", "--optimizer.learning_rate=3: the study sets this field"),
        ("--model.dim=64", "the weights have dim 96"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(small, option, message):
    folder = Path(small[1].removeprefix("--output=")).parent
    before = list(folder.rglob("*"))
    others = [other for other in small if other.partition("=")[0] != option.partition("=")[0]]
    with pytest.raises(InputError, match=re.escape(message)):
        execute("study", [*others, option])
    with pytest.raises(InputError, match=re.escape("--pilot: expected without --report")):
        execute("study", [*small, "--pilot", "--report"])
    assert list(folder.rglob("*")) == before


def test_the_report_alone_can_be_written(config, tmp_path, trained):
    options = [f"--config={config}", f"--docs={tmp_path / 'docs'}", f"--output={tmp_path / 'none'}", "--report"]
    execute("study", options)
    text = (tmp_path / "docs" / "study.md").read_text(encoding="utf-8")
    assert "**Incomplete: 0 of " in text
    assert "    python scripts/study.py --config=" in text
    assert "--report\n" not in text
    assert not (tmp_path / "docs" / "study" / "results.jsonl").exists()
    assert not (tmp_path / "none").exists()


def test_a_signal_ends_the_program_with_code_75(config, tmp_path, trained, monkeypatch, call):
    def interrupted(run, resume):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runs, "train", interrupted)
    outcome = call("study", f"--config={config}", f"--docs={tmp_path / 'docs'}", f"--output={tmp_path / 'runs'}")
    assert outcome.code == 75
    assert outcome.err.splitlines()[-1].endswith("runs are done; to continue, run the same command again")


# --- From beginning to end -------------------------------------------------------------------------------------------


def _records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_small_study(small, monkeypatch, capsys):
    monkeypatch.setattr(protocol, "PILOT_LENGTHS", (3, 4))
    monkeypatch.setattr(protocol, "PILOT_LEARNING_RATES", (1e-3,))
    output, docs = (Path(option.partition("=")[2]) for option in small[1:3])
    execute("study", [*small, "--pilot"])
    assert "| gravity | 0.001 | 4 |" in capsys.readouterr().out
    execute("study", small)
    file = docs / "study" / "results.jsonl"
    first = _records(file)
    measured = {(r["law"], r["arm"], r["seed"], r["steps"]) for r in first if r["kind"] == "run"}
    trained = itertools.product(("gravity", "returning"), ("fm", "tfm"), (0, 1), (2, 3))
    assert measured == {*trained, *itertools.product(("gravity", "returning"), ("base",), (0, 1), (0,))}
    assert all(np.isfinite(r["metrics"]["wasserstein"]) for r in first if r["kind"] == "run")

    text = (docs / "study.md").read_text(encoding="utf-8")
    assert "Incomplete" not in text
    pictures = re.findall(r"\]\((study/\S+\.png)\)", text)
    assert len(pictures) == 6
    for picture in pictures:
        assert (docs / picture).stat().st_size < 300_000
        assert Image.open(docs / picture).width > 400
    assert "nan" not in text
    assert "None" not in text

    # tfm-evaluate measures the same numbers.
    made = output / "returning"
    execute("evaluate", [
        str(made / "tfm" / "rate0.001_seed0" / "samples_step3"), f"--reference={made / 'reference'}",
        f"--prompts={made / 'prompts.txt'}", f"--json={output / 'one.json'}", "--frames=5", "--height=32", "--width=48",
    ])  # fmt: skip
    again = json.loads((output / "one.json").read_text(encoding="utf-8"))["metrics"]
    kept = Run("returning", "tfm", 0, (3,), 1e-3).keys
    results = Results(file, {name: value for name, value in first[0].items() if name != "kind"})
    assert results.one("run", **kept, steps=3)["metrics"] == {name: row["samples_step3"] for name, row in again.items()}

    # If the last record is incomplete and all other files are lost, the study continues and gets the same results.
    shutil.rmtree(output)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    execute("study", small)
    now = _records(file)
    assert now[:-1] == first[:-1]
    assert now[-1]["sensitivity"] == first[-1]["sensitivity"]  # the same network, bit for bit
    values = [np.array([*run["metrics"].values()], np.float64) for run in (now[-1], first[-1])]  # NaN for None
    np.testing.assert_array_equal(*values)
    assert len(re.findall(r"\.png\)", (docs / "study.md").read_text(encoding="utf-8"))) == 6  # kept
    size = file.stat().st_size
    execute("study", small)
    assert file.stat().st_size == size
