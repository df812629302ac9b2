"""The report of the study: verdicts, tables and sentences from invented results."""

import re

import pytest
from helpers.small_study import invent_findings, make_small_study, write_config

from tfm_jax.moving_shapes.study import protocol, tables
from tfm_jax.moving_shapes.study.conclusions import conclusions
from tfm_jax.moving_shapes.study.findings import Cell
from tfm_jax.moving_shapes.study.formats import format_spread
from tfm_jax.moving_shapes.study.pilot import pilot_section
from tfm_jax.moving_shapes.study.plan import planned_runs
from tfm_jax.moving_shapes.study.power import foresee
from tfm_jax.moving_shapes.study.report import write_report
from tfm_jax.moving_shapes.study.results import Results


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def small_pilot(monkeypatch):
    monkeypatch.setattr(protocol, "PILOT_LENGTHS", (10, 30, 50))
    monkeypatch.setattr(protocol, "PILOT_LEARNING_RATES", (1e-4, 1e-3, 1e-2))


@pytest.fixture
def study(config, tmp_path):
    return make_small_study(tmp_path, config)


@pytest.mark.parametrize(
    ("effects", "verdict", "sentence", "summary"),
    [
        ({"residual": -0.2, "frechet": -0.2}, "better", "**`tfm` moves better than `fm`**.", "on every law"),
        ({"residual": 0.2, "frechet": 0.2}, "worse", "both deciding metrics are worse.", "worse in 4 of 4"),
        ({"residual": -0.2, "frechet": 0.2}, "mixed", "and worse on the other.", "in any of the 4 cases."),
        ({"residual": -0.2}, "partly better", "only (physics residual R, median, pixels)", "it is better in 4."),
        ({"frechet": 0.2}, "partly worse", "(Frechet motion distance, pixels^2)", "it is worse in 4."),
        ({"residual": -0.2, "frechet": -0.2, "moving": -0.2}, "guarded", "does not count", "in any of the 4 cases."),
        ({"residual": None, "frechet": -0.2}, "missing", "no finite number", "as a whole is not decided"),
        ({"faithful": 0.9}, "undetected", "no difference is detected.", "cannot tell `tfm` from `fm`"),
    ],
)
def test_the_verdict_follows_from_the_numbers(study, effects, verdict, sentence, summary):
    found = invent_findings(study, **effects)
    assert {found.verdict(cell) for cell in found.cells} == {verdict}
    text = conclusions(found)
    for cell in ("*gravity*, 10 steps", "*gravity*, 30 steps", "*returning*, 10 steps", "*returning*, 30 steps"):
        assert f"- {cell}: " in text
    assert text.count(sentence) >= 4
    assert summary in text
    assert "None" not in text
    assert "nan" not in text
    if verdict == "undetected":
        assert re.search(r"true differences may still be as large as \d+% of the value of `fm`", text)


def test_the_verdict_of_a_single_law_and_length(study):
    found = invent_findings(study, residual=-0.2, frechet=-0.2)
    found.results.records = [
        run if run.get("law") == "gravity" or run["kind"] != "run" or run["arm"] != "tfm"
        else {**run, "metrics": {**run["metrics"], "frechet": 1.0 + run["seed"] + 0.01 * (-1) ** run["seed"]}}
        for run in found.results.records
    ]  # fmt: skip
    assert found.verdict(Cell("gravity", 30)) == "better"
    assert found.verdict(Cell("returning", 30)) == "partly better"
    assert "moves better than `fm` in 2 of 4 cases." in conclusions(found)


def test_only_the_confirmatory_family_is_corrected(study):
    found = invent_findings(study)
    cell = Cell("returning", 10)

    def width(arm: str, metric: str) -> float:
        difference = found.difference(cell, arm, "fm", metric)
        return difference.high - difference.low

    assert found.corrected == pytest.approx(1 - 0.05 / 8)
    assert width("tfm", "residual") > 1.5 * width("tfm_mse", "residual")
    assert width("tfm", "tracked") == pytest.approx(width("tfm_mse", "tracked"))


def test_an_incomplete_study_says_so_and_decides_nothing(study):
    runs = list(planned_runs(study))
    first = 2 * 6 + 3  # of every seed, base, fm and tfm come first, on two laws
    found = invent_findings(study, runs=first, residual=-0.2, frechet=-0.2)
    text = write_report(found, "python scripts/study.py").read_text(encoding="utf-8")
    assert f"**Incomplete: {first} of {len(runs)} planned runs are done.**" in text[:200]
    assert "*returning*, 30 steps: not decided yet; 2 of 5 seeds are done." in text
    assert "moves better than `fm`**" not in text


def test_the_report_of_a_study_without_results(study):
    found = invent_findings(study, runs=0, pilot=False)
    found.results.records = found.results.records[:1]
    text = write_report(found, "python scripts/study.py").read_text(encoding="utf-8")
    assert f"**Incomplete: 0 of {len(list(planned_runs(study)))} planned runs are done.**" in text
    assert "There are no results of a pilot" in text
    assert "nan" not in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("by_seed", "text"),
    [
        ({0: 2.0, 1: 4.0}, "3 ± 1.4"),
        ({0: 2.0, 1: 4.0, 2: None}, "3 ± 1.4 (1 of 3 -)"),
        ({0: 2.0}, "2 (one seed)"),  # one number has no standard deviation
        ({0: None}, "-"),
    ],
)
def test_means_over_the_seeds(by_seed, text):
    assert format_spread(by_seed) == text


def test_the_report_of_a_complete_study(study):
    found = invent_findings(study, residual=-0.5)
    found.results.add("power", differences=foresee(study, found.pilot))
    text = write_report(found, "python scripts/study.py").read_text(encoding="utf-8")
    assert "Incomplete" not in text
    assert "nan" not in text
    assert "None" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| gravity | 10 | physics")]
    assert re.search(r"\*\*-0\.\d+ \[-0\.5\d*, -0\.4\d*\]\*\* \| 0\.0\d+ \| [\d.]+ \|$", row)
    assert "± 1.6 |" in text  # the seeds are 0 to 4
    assert "equal steps are also equal time" in text
    contrasts = tables.law_section(found, "gravity").partition("Where a difference comes from")[2]
    assert "`tfm` less `fm` " in contrasts
    assert "`fm_direction`" not in contrasts  # was not run
    assert "`tfm_rho2`" in tables.law_section(found, "gravity")
    assert "`tfm_rho2`" not in tables.law_section(found, "returning")
    for name in ("lengths", "differences"):
        assert 5_000 < (study.docs / "study" / f"{name}.png").stat().st_size < 300_000


def test_costs_that_differ_are_named(study):
    found = invent_findings(study)
    found.results.add("cost", seconds={"fm": [0.1, 0.2, 0.1], "tfm": [0.12, 0.24, 0.12], "tfm_mse": [0.1, 0.2, 0.104]})
    text = tables.costs(found)
    assert "These arms differ by more: `tfm` (+20%)." in text
    assert "| `tfm` | 120 ms | 1.200 (1.200 to 1.200) |" in text


def test_sensitivity_is_compared_at_each_noise_level(study):
    text = tables.sensitivity(invent_findings(study))
    levels = ", ".join(f"{sigma:g}" for sigma in protocol.SIGMAS[1:-1])
    assert f"On *returning*, `tfm` is less sensitive than `fm` at {levels} and 0.9 (exploratory" in text
    assert "| 0.1 | +0.02 [" in text
    assert re.search(r"\| 0\.2 \| \*\*-0\.22 \[", text)


def test_the_pilot_shows_whether_it_supports_the_choice(study, config, tmp_path):
    found = invent_findings(study, runs=0)
    text = pilot_section(study, found.pilot)
    choice = "On *returning*, the study uses a learning rate of 0.001 and up to 30 steps: "
    assert choice + "the fine-tuned model is better" in text
    assert "From 30 to 50 steps, physics residual R, median, pixels changes by +0%" in text
    assert len([line for line in text.splitlines() if line.startswith("| gravity | ")]) == 10
    assert text.count("| yes |") == 18
    for run in found.pilot.all("run", law="returning", steps=30):
        run["metrics"]["frechet"] = 2.0
    assert "is **not** better than the base model" in pilot_section(study, found.pilot)
    other = make_small_study(tmp_path / "other", config, learning_rate=0.5)
    longest = make_small_study(tmp_path / "longest", config, lengths=(10, 30, 50))
    assert "From 30 to 50 steps, physics residual" in pilot_section(longest, found.pilot)
    assert "the pilot did not measure these" in pilot_section(other, found.pilot)


def test_the_smallest_detectable_difference_comes_from_the_pilot(config, tmp_path):
    study = make_small_study(tmp_path, config, lengths=(10, 30, 50), seeds=8)
    found = invent_findings(study, runs=0)
    stated = foresee(study, found.pilot)
    assert len(stated) == 12
    # The two seeds differ by 0.01, so that their differences vary by 0.01, and the factor is 1.9 for 8 seeds.
    assert stated[0]["spread"] == pytest.approx(0.01)
    assert 0.015 < stated[0]["smallest"] < 0.022
    assert foresee(study, Results(tmp_path / "none.jsonl", {})) == []
