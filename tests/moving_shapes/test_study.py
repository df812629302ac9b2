"""The study: statistics, the results file, the sentences of the report, and a small study from beginning to end."""

import itertools
import json
import re
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_model import write_model
from helpers.tiny_world import execute
from jax.tree_util import Partial
from PIL import Image

from tfm_jax.config import load
from tfm_jax.data.metadata import read_metadata
from tfm_jax.errors import InputError
from tfm_jax.moving_shapes.study import protocol, report
from tfm_jax.moving_shapes.study import results as results_module
from tfm_jax.moving_shapes.study.conclusions import GUARDED, conclusions
from tfm_jax.moving_shapes.study.cost import relative_cost, steps_at_equal_time
from tfm_jax.moving_shapes.study.findings import Findings
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.moving_shapes.study.runs import Size, Study, StudyRun, planned_runs, settings
from tfm_jax.moving_shapes.study.sensitivity import measure_sensitivity
from tfm_jax.moving_shapes.study.statistics import bootstrap, interval_coverage, paired_difference
from tfm_jax.moving_shapes.world import write_clips

METRICS = (*GUARDED, *protocol.SECONDARY)


# --- Statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_bootstrap_is_over_all_resamples(statistic):
    values = [0.3, -1.0, 2.0, 0.9]
    every = [statistic(draw) for draw in itertools.product(values, repeat=4)]
    low, high = np.quantile(every, (0.025, 0.975))
    found = bootstrap(values, statistic)
    assert found.value == pytest.approx(statistic(values))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.05), pytest.approx(high, abs=0.05))
    assert found == bootstrap(values, statistic)
    assert found.values == tuple(values)


def test_intervals_that_exclude_zero():
    assert bootstrap([0.1, 0.2, 0.3]).excludes_zero
    assert bootstrap([-0.1, -0.2, -0.3]).excludes_zero
    assert not bootstrap([-0.1, 0.2, 0.1]).excludes_zero
    assert not bootstrap([0.0, 0.0, 0.0]).excludes_zero


def test_pairing_removes_what_seeds_share():
    seeds = {seed: 10.0 * seed for seed in range(5)}
    better = {seed: value - 0.5 + 0.01 * seed for seed, value in seeds.items()}
    found = paired_difference(better, seeds)
    assert found is not None
    assert found.value == pytest.approx(-0.48)
    assert -0.5 <= found.low < found.high <= -0.46
    assert found.excludes_zero
    shifted = {(seed + 1) % 5: value for seed, value in better.items()}
    assert not paired_difference(shifted, seeds).excludes_zero  # the same numbers with other partners


def test_pairs_are_the_common_seeds_and_no_failure_is_left_out():
    assert paired_difference({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.0, 0: 1.0, 3: 5.0}).values == (0.0, 1.0)
    assert paired_difference({0: 1.0, 1: None}, {0: 1.0, 1: 1.0}) is None
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_intervals_over_few_seeds_are_too_short():
    assert 0.80 < interval_coverage(5) < 0.88
    assert 0.93 < interval_coverage(60) < 0.97


# --- Cost ------------------------------------------------------------------------------------------------------------


def test_cost_is_compared_within_rounds():
    load = np.random.default_rng(0).uniform(1, 5, 30)  # load of the machine, the same for all arms of a round
    arms = {"fm": load, "tfm": 1.25 * load, "tfm_mse": 1.03 * load, "fm_warp": load[::-1]}
    seconds = {arm: each.tolist() for arm, each in arms.items()}
    assert relative_cost(seconds, "tfm").value == pytest.approx(1.25)
    assert steps_at_equal_time(seconds, "tfm", 100) == 80
    assert steps_at_equal_time(seconds, "tfm_mse", 100) == 100  # beyond the noise, but too small to matter
    assert steps_at_equal_time(seconds, "fm_warp", 100) == 100  # within the noise
    assert steps_at_equal_time(seconds, "fm", 100) == 100


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


def test_results_that_another_process_adds_are_kept(tmp_path, monkeypatch):
    """Even while a second process starts and finds an incomplete line."""
    file = tmp_path / "results.jsonl"
    first = Results(file, {"weights": "abc"})
    with open(file, "a", encoding="utf-8") as stream:
        stream.write('{"kind": "ru')
    read = results_module._read
    threads = []

    def read_and_be_overtaken(file):
        records = read(file)
        threads.append(threading.Thread(target=first.add, args=["run"], kwargs={"arm": "fm"}))
        threads[-1].start()
        threads[-1].join(0.2)
        return records

    monkeypatch.setattr(results_module, "_read", read_and_be_overtaken)
    second = Results(file, {"weights": "abc"})
    monkeypatch.undo()
    threads[0].join()
    second.add("run", arm="tfm")
    second.reload()
    assert [run["arm"] for run in second.all("run")] == ["fm", "tfm"]


def test_results_of_another_study_are_refused(tmp_path):
    file = tmp_path / "results.jsonl"
    Results(file, {"size": {"clips": 4}, "weights": "abc"})
    with pytest.raises(InputError, match=r"a study with size\.clips=4, not 5; choose another --output"):
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


# --- The report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Options of a study with 2 arms, 2 seeds and 3 steps, on a model with random weights."""
    folder = tmp_path_factory.mktemp("study")
    write_clips(folder / "some", 8, frames=5, size=(32, 48))
    write_model(folder / "model", [clip.prompt for clip in read_metadata(folder / "some")])
    values = {
        "model": {"path": folder / "model", "dim": 96, "ffn_dim": 256, "heads": 4, "layers": 4, "dtype": "float32"},
        "clip": {"frames": 5, "height": 32, "width": 48},
        "data": {"path": "none"},
        "lora": {"rank": 2},
        "train": {"output": "none", "steps": 1, "batch_size": 2},
        "sampling": {"output": "none", "steps": 2},
    }
    (folder / "config.yaml").write_text(json.dumps(values, default=str), encoding="utf-8")  # JSON is YAML
    return [
        f"--config={folder / 'config.yaml'}", f"--output={folder / 'runs'}", f"--docs={folder / 'docs'}",
        "--arms=[fm, tfm]", "--seeds=2", "--steps=3", "--clips=6", "--prompts=3", "--reference=6", "--rounds=8",
    ]  # fmt: skip


@pytest.fixture
def findings(small, tmp_path):
    """A function from effects (metric -> what TFM adds to it) to invented findings of 3 arms and 5 seeds."""
    config = small[0].removeprefix("--config=")
    run = load(StudyRun, config, {"train.steps": 10})
    study = Study(run, Size(("fm", "tfm", "tfm_mse")), tmp_path)

    def make(**effects: float | None) -> Findings:
        results = Results(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", settings(study))
        results.add("cost", seconds={arm: [0.1, 0.2, 0.1] for arm in study.size.arms})
        column = dict.fromkeys(METRICS, 1.0)
        results.add("real", compared=3, generated=column, reference=column, floor=column)
        for seed, arm, steps in planned_runs(study, results):
            nothing = 0.01 * (-1) ** seed * (arm != "fm")  # differences on both sides of zero
            metrics: dict[str, float | None] = dict.fromkeys(METRICS, 1.0 + seed + nothing)
            for metric, effect in effects.items() if arm == "tfm" else ():
                metrics[metric] = None if effect is None else 1.0 + seed + nothing + effect
            losses = {"ordered": [1.0] * 9, "permuted": [1.5] * 9}
            results.add("run", arm=arm, seed=seed, steps=steps, metrics=metrics, sensitivity=losses)
        return Findings(study, results)

    return make


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ({"residual": -0.2, "frechet": -0.2}, "Yes**"),
        ({"residual": 0.2, "frechet": 0.2}, "No, it moves worse.**"),
        ({"residual": -0.2, "frechet": 0.2}, "No**: it is not better on both"),
        ({"residual": -0.2, "frechet": -0.2, "moving": -0.2}, "No**: both deciding metrics are better, but"),
        ({"residual": None, "frechet": -0.2}, "Not decided**"),
        ({"faithful": 0.9}, "No difference is detected**"),
    ],
)
def test_the_verdict_follows_from_the_numbers(findings, effects, verdict):
    text = conclusions(findings(**effects))
    assert verdict in text.splitlines()[2]
    assert "None" not in text
    assert "nan" not in text


def test_tables_show_pairs_and_equal_time(findings, tmp_path):
    found = findings(residual=-0.5)
    tables = report._differences(found, tmp_path)
    (row,) = [line for line in tables.splitlines() if line.startswith("| `tfm` | **-0.")]
    assert re.match(r"\| `tfm` \| \*\*-0\.\d+ \[-0\.5\d*, -0\.4\d*\]\*\* \|", row)
    assert (tmp_path / "differences.png").stat().st_size < 300_000
    assert "± 1.6 |" in report._levels(found)  # the seeds are 0 to 4
    assert "equal steps mean equal time" in report._costs(found)
    assert "| `tfm` | 1.500 |" in report._sensitivity(found)
    contrasts = report._contrasts(found)
    assert "`tfm` less `fm`" in contrasts
    assert "`fm_direction`" not in contrasts  # was not run


def test_arms_that_cost_more_are_run_for_equal_time_too(findings):
    found = findings()
    found.results.add("cost", seconds={"fm": [0.1, 0.2, 0.1], "tfm": [0.2, 0.4, 0.2], "tfm_mse": [0.1, 0.2, 0.1]})
    runs = list(planned_runs(found.study, found.results))
    assert [run for run in runs if run[0] == 4] == [
        (4, "base", 0), (4, "fm", 10), (4, "tfm", 10), (4, "tfm", 5), (4, "tfm_mse", 10),
    ]  # fmt: skip
    for seed in range(5):
        metrics = dict.fromkeys(METRICS, 1.0 + seed)
        found.results.add("run", arm="tfm", seed=seed, steps=5, metrics=metrics)
    assert re.search(r"\| `tfm` \| 5 \| [+-]", report._costs(found))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--arms=[tfm]", "--arms=tfm: expected fm among them"),
        ("--arms=[fm, mse]", "--arms=mse: expected one of fm, "),
        ("--seeds=1", "--seeds=1: expected at least 2"),
        ("--laws=[falling]", "--laws=falling: expected one of still, "),
        ("--train.steps=3", "--train.steps=3: the study sets this field"),
        ("--model.dim=64", "the weights have dim 96"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(small, option, message):
    output = Path(small[1].removeprefix("--output="))
    before = list(output.rglob("*"))
    others = [other for other in small if other.partition("=")[0] != option.partition("=")[0]]
    with pytest.raises(InputError, match=re.escape(message)):
        execute("study", [*others, option])
    assert list(output.rglob("*")) == before


# --- From beginning to end -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_study(small, capsys):
    output, docs = (Path(option.partition("=")[2]) for option in small[1:3])
    execute("study", small)
    file = output / "results.jsonl"
    first = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    runs = [(r["arm"], r["seed"]) for r in first if r["kind"] == "run"]
    assert set(runs) == set(itertools.product(("base", "fm", "tfm"), (0, 1)))
    assert all(np.isfinite(r["metrics"]["wasserstein"]) for r in first if r["kind"] == "run")

    prompts = (output / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(prompts)) == 3
    assert not set(prompts) & {clip.prompt for clip in read_metadata(output / "clips")}

    text = (docs / "study.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((study/\S+\.png)\)", text)
    assert len(pictures) == 4
    for picture in pictures:
        assert (docs / picture).stat().st_size < 300_000
        assert Image.open(docs / picture).width > 500
    assert "nan" not in text
    assert "None" not in text

    # tfm-evaluate measures the same numbers.
    folder = next(output.glob("tfm/seed0_steps3")) / "samples"
    execute("evaluate", [
        str(folder), f"--reference={output / 'reference'}", f"--prompts={output / 'prompts.txt'}",
        f"--json={output / 'one.json'}", "--frames=5", "--height=32", "--width=48",
    ])  # fmt: skip
    measured = json.loads((output / "one.json").read_text(encoding="utf-8"))["metrics"]
    (kept,) = [r for r in first if r["kind"] == "run" and (r["arm"], r["seed"], r["steps"]) == ("tfm", 0, 3)]
    assert kept["metrics"] == {name: row["samples"] for name, row in measured.items()}

    # If the last record is incomplete, the study continues and gets the same results.
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    execute("study", small)
    again = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert again[:-1] == first[:-1]
    before, now = first[-1], again[-1]
    assert (now["arm"], now["seed"], now["steps"]) == (before["arm"], before["seed"], before["steps"])
    assert now["sensitivity"] == before["sensitivity"]  # the same network, bit for bit
    values = [np.array([*run["metrics"].values()], np.float64) for run in (now, before)]  # NaN for None
    np.testing.assert_array_equal(*values)
    size = file.stat().st_size
    execute("study", small)
    assert file.stat().st_size == size
    assert "steps" not in capsys.readouterr().out.splitlines()[-1]
