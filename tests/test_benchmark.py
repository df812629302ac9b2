"""The machinery of the benchmark, that its peer of the objective is the official algorithm, and that every subject
runs at a tiny size."""

import dataclasses
import itertools
import json
import types
from typing import get_args

import numpy as np
import pytest
import torch
from benchmarks import objective, results, timing
from benchmarks.sizes import CPU, SIZES, TextWork, VaeWork, Work
from benchmarks.timing import Row, pair, race, take_turns
from helpers.tfm_clips import CASES, distance, golden
from helpers.tiny_world import program

MACHINE = {"date": "2026-11-30", "device": "a chip | of two"}


def row(subject="training", case="a step", ours="remat=full", seconds=2.0, peer="diffusers", peer_seconds=3.0, note=""):
    return Row(subject, case, ours, seconds, peer, peer_seconds, note)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only advances when told to, and the function that does so."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def advance(seconds):
        now[0] += seconds

    return advance


# --- Timing ----------------------------------------------------------------------------------------------------------


def test_programs_take_turns_and_the_warm_up_does_not_count(clock):
    calls = []
    ours, theirs = itertools.chain([90], [1, 5, 3]), itertools.chain([80], [10, 40, 20])

    def program(name, durations):
        def run():
            calls.append(name)
            clock(next(durations))

        return run

    times = take_turns({"ours": program("ours", ours), "theirs": program("theirs", theirs)}, budget=0)
    assert times == {"ours": 3, "theirs": 20}
    assert calls == ["ours", "theirs"] * 4


def test_rounds_go_on_until_the_budget_is_spent(clock):
    counts = {"slow": 0, "fast": 0}

    def program(name, seconds):
        def run():
            counts[name] += 1
            clock(seconds)

        return run

    take_turns({"slow": program("slow", 30), "fast": program("fast", 20)}, budget=500)
    assert counts == {"slow": 11, "fast": 11}


def test_a_race_is_a_row_whose_ratio_is_above_1_if_ours_is_faster(clock):
    found = race("files", "load", lambda: clock(2), "cp", lambda: clock(5), 0)
    assert found == Row("files", "load", "", 2, "cp", 5)
    assert found.ratio == 2.5


def test_every_way_of_ours_is_paired_with_every_peer():
    rows = pair("training", "a step", {"a": 1, "b": 2, "x": 4, "y": 8}, ["a", "b"], ["x", "y"])
    assert [(row.ours, row.peer, row.ratio) for row in rows] == [
        ("a", "x", 4), ("a", "y", 8), ("b", "x", 2), ("b", "y", 4),
    ]  # fmt: skip


# --- Results ---------------------------------------------------------------------------------------------------------


def test_rows_are_written_and_read_back(tmp_path):
    rows = [row(), row(subject="text_encoder", note="5 % | more")]
    results.write(tmp_path / "new", "cpu", MACHINE, rows)
    assert results.read(tmp_path / "new" / "cpu.json") == [(each, MACHINE) for each in rows]
    page = (tmp_path / "new" / "cpu.md").read_text()
    assert "device: a chip | of two." in page
    assert "## Text encoder" in page
    assert "| a step | remat=full | 2 | diffusers | 3 | 1.50 | 5 % \\| more |" in page
    stored = json.loads((tmp_path / "new" / "cpu.json").read_text())["runs"][0]["rows"][0]
    assert stored["ratio"] == 1.5


def test_other_subjects_stay_with_their_machine(tmp_path):
    results.write(tmp_path, "cpu", MACHINE, [row(), row(subject="files")])
    later = {**MACHINE, "date": "2027-01-01"}
    results.write(tmp_path, "cpu", later, [row(seconds=1.0)])
    assert results.read(tmp_path / "cpu.json") == [(row(subject="files"), MACHINE), (row(seconds=1.0), later)]
    page = (tmp_path / "cpu.md").read_text()
    assert page.index("2026-11-30") < page.index("## Files") < page.index("2027-01-01") < page.index("## Training")


def test_the_growth_of_a_step_is_drawn_beside_that_of_its_operations(tmp_path):
    cases = {"a step, width 8": 1.0, "2 x the frames": 2.5, "2 x the rank": 1.1, "4 x the frames": 6.0}
    rows = [row(subject="growth", case=case, seconds=seconds) for case, seconds in cases.items()]
    results.write(tmp_path, "cpu", MACHINE, [row()])
    assert not (tmp_path / "cpu_growth.png").exists()
    results.write(tmp_path, "cpu", MACHINE, rows)
    assert (tmp_path / "cpu_growth.png").read_bytes().startswith(b"\x89PNG")
    assert "](cpu_growth.png)" in (tmp_path / "cpu.md").read_text()


def test_only_ratios_that_fell_by_more_than_the_tolerance_are_reported():
    before = [row(), row(case="another step"), row(ours="remat=none")]
    fell = 3 / (1.5 * (1 - results.TOLERANCE))
    now = [row(seconds=fell * 1.01), row(case="another step", seconds=fell * 0.99), row(case="new", seconds=100)]
    lines = results.compare(before, now)
    assert lines == ["training, a step, remat=full: 1.26 x diffusers, was 1.50"]
    assert not results.compare(before, [row(seconds=0.1)])


def test_the_description_names_machine_and_versions():
    device = types.SimpleNamespace(platform="cpu")
    machine = results.describe_machine(device)
    assert machine["torch"] == torch.__version__
    assert machine["cores"] >= 1
    assert machine["device"]


# --- Subjects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_peer_of_the_objective_is_the_official_algorithm(case):
    g = {name: np.array(value) for name, value in golden(case).items()}
    clean, noise, prediction = (
        torch.from_numpy(g[name][0].reshape(g[name].shape[1], -1)) for name in ("clean", "noise", "prediction")
    )
    x_t, loss, gradient = objective.official(prediction, clean, noise, float(g["sigma"][0]))
    assert distance(x_t.reshape(g["euler_x_t"][0].shape), g["euler_x_t"][0]) < 1e-5
    assert loss.item() == pytest.approx((g["direction_loss"] + g["residual_loss"]).item(), rel=1e-4)
    assert distance(gradient.reshape(g["loss_grad"][0].shape), g["loss_grad"][0]) < 1e-4


def test_growth_changes_one_size_at_a_time():
    from benchmarks import growth

    work = SIZES["cpu"].growth
    cases = growth.variants(work)
    assert len(cases) == 11
    first = growth.operations(work)
    assert growth.operations(cases["4 x the batch"]) == 4 * first
    assert first < growth.operations(cases["2 x the rank"]) < 1.2 * first
    assert cases["2 x the height"].tokens == cases["2 x the frames"].tokens == 2 * work.tokens


@pytest.mark.slow
def test_every_subject_runs(monkeypatch):
    from benchmarks import data, startup, watching

    config = dataclasses.replace(CPU.startup.config, layers=1)
    work = Work(config, 1, (2, 4, 4), 4)
    text = TextWork(dataclasses.replace(CPU.text[0].config, layers=1), 1, 16)
    tiny = CPU._replace(
        budget=0, objective=(3, 4, 6, 16), training=(work,), sampling=(work,), sampling_steps=2, files=config,
        vae=(VaeWork(16, 5, 32, 32),), text=(text,), attention=((1, 80, 100, 2, 32),), growth=work, startup=work,
    )  # fmt: skip
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(data, "MANY", 640)
    monkeypatch.setattr(startup, "ROUNDS", 1)
    for name, value in {"STEPS": 20, "BARE_STEPS": 5, "EVERY": 5}.items():
        monkeypatch.setattr(watching, name, value)
    benchmark = program("benchmark")
    subjects = get_args(benchmark.Subject)
    rows = benchmark.run(subjects, tiny)
    assert list(dict.fromkeys(found.subject for found in rows)) == list(subjects)
    assert all(np.isfinite(found.ratio) and found.ratio > 0 for found in rows)
    assert len({found.key for found in rows}) == len(rows)
