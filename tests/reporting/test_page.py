"""The page of a run: what it contains, and that it loads nothing and runs nothing that came from a run."""

import json
import re
import shutil
import subprocess

import pytest
from helpers.report_runs import EVIL, PROMPTS, SKIPPED, STEPS, bare_run, write_lines, write_run, write_video
from plotly.offline import get_plotlyjs

from tfm_jax.errors import InputError
from tfm_jax.reporting import series
from tfm_jax.reporting.page import write_report
from tfm_jax.reporting.samples import build_samples


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that tests only read."""
    return write_run(tmp_path_factory.mktemp("runs") / "kites & <b>co")


@pytest.fixture(scope="module")
def page(run) -> str:
    return write_report(run).read_text(encoding="utf-8")


def block(page: str, name: str) -> dict:
    """Return a block of data as the program of the page reads it: up to the first end of a script element."""
    start = re.search(rf'<script type="application/json" id="{name}-data"[^>]*>', page).end()
    return json.loads(page[start : page.index("</script", start)])


def curves(folder) -> dict:
    return block(write_report(folder).read_text(encoding="utf-8"), "curves")


def panel(data: dict, title: str) -> dict[str, list]:
    [found] = [panel for panel in data["curves"]["panels"] if panel["title"] == title]
    return {curve["name"]: curve["values"] for curve in found["curves"]}


def test_curves(page):
    data = block(page, "curves")
    assert data["curves"]["steps"] == list(range(1, STEPS + 1))
    titles = [panel["title"] for panel in data["curves"]["panels"]]
    assert titles == ["Loss", "Gradient norm", "Learning rate", "Throughput", "Time per step", "Utilisation",
                      "Device memory"]  # fmt: skip
    losses = panel(data, "Loss")
    assert list(losses) == ["loss", "direction", EVIL]
    assert [step for step, value in enumerate(losses["loss"], 1) if value is None] == [SKIPPED]
    assert panel(data, "Device memory")["memory"][0] == 2
    assert panel(data, "Utilisation")["MFU"][0] == 50


def test_summary_and_tables(page):
    data = block(page, "curves")
    assert data["name"] == "kites & <b>co"
    assert "<title>kites &amp; &lt;b&gt;co: training report</title>" in page
    assert data["state"] == "unfinished"
    steps, loss, *others = data["summary"]
    assert steps == f"step {STEPS} of 50"
    assert loss.endswith("(mean of the last 39 steps)")
    assert others == ["4 clips per second", "2 s per step", "0:00:20 left at this speed", "1 skipped step"]
    assert (data["resumed"], data["skipped"]) == ([21], [SKIPPED])
    assert data["skipped_table"] == [[str(SKIPPED), "bad.mp4"]]
    assert data["events"][0] == ["2030-01-01T10:00:00", "0", "started", EVIL]
    assert data["settings"] == {"train": [["epochs", "2"]], "model": [["path", "</script>"]]}
    assert data["environment"] == [["versions.jax", "0.0"], ["command", json.dumps(["tfm-train", EVIL])]]
    assert data["notes"] == []


def test_validation_compares_lora_and_base(page):
    fm, tfm = block(page, "curves")["validation"]
    assert (fm["title"], tfm["title"]) == ("Flow matching loss", "TFM loss")
    assert (fm["base"], fm["steps"], fm["lora"]) == (0.4, [20, 40], [0.3, 0.2])
    levels = fm["levels"]
    assert levels["sigma"] == [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    assert (levels["base"][1], levels["lora"][1][1]) == (0.8, 0.4)
    assert levels["change"] == [[-25, -50]] * 10


def test_training_loss_by_level(page):
    levels = block(page, "curves")["training_levels"]
    assert levels["values"][1] == [None] * 39
    assert levels["values"][2] == levels["steps"]


def test_samples(page):
    samples = block(page, "samples")
    assert (samples["steps"], samples["note"]) == ([20, 40], "")
    assert [row["caption"] for row in samples["rows"]] == PROMPTS
    for row in samples["rows"]:
        assert all(uri.startswith("data:video/mp4;base64,AAAA") for uri in (row["base"], *row["lora"]))


def test_nothing_is_fetched_and_no_text_becomes_markup(page):
    assert "default-src 'none';" in page
    assert "connect-src" not in page
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < len(page)
    assert not re.search(r"https?://", own)
    loaded = re.findall(r'\b(?:src|href|action)="([^"]*)"', re.sub(r"(?s)<script.*?</script>", "", own))
    assert {target for target in loaded if not target.startswith("#")} == {"data:,"}
    assert own.count("<script") == own.count("</script>") == 4
    assert "<b>" not in own


def test_a_run_in_progress(tmp_path):
    """No step yet, then a line that is cut off."""
    folder = bare_run(tmp_path / "run")
    data = curves(folder)
    assert data["summary"] == ["step 0 of 50"]
    assert data["notes"] == ["No step is finished yet. The first one comes after the program has been compiled."]
    assert block((folder / "report.html").read_text(encoding="utf-8"), "samples")["rows"] == []

    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    data = curves(folder)
    assert panel(data, "Loss") == {"loss": [0.5]}
    assert data["notes"] == [
        "metrics.jsonl: 1 line is left out, because a line that is cut off or damaged cannot be read."
    ]


def test_damaged_files_are_left_out_with_a_note(tmp_path):
    folder = bare_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1}\n\0\xff\n[1]\n{"step": true}\n')
    write_lines(folder / "validation.jsonl", [
        {"step": 5, "model": "lora", "loss": 3},
        {"step": 6, "model": "lora", "loss": {"fm": "x"}, "by_level": {"fm": [1, 2]}},
        {"step": 7, "model": "lora", "loss": {"fm": 1.0}, "by_level": {"fm": [1, 2, 3]}},
    ])  # fmt: skip
    (folder / "environment.json").write_text('{"jax": ')
    data = curves(folder)
    assert data["notes"][0].startswith("metrics.jsonl: 3 lines are left out")
    assert data["notes"][1] == "environment.json could not be read: it is not a complete JSON object."
    [fm] = data["validation"]
    assert (fm["base"], fm["steps"], fm["lora"]) == (None, [6, 7], [None, 1])
    assert (fm["levels"]["lora"], fm["levels"]["change"]) == ([[1, 2], [None, None]], None)


def test_the_last_record_of_a_repeated_step_counts(tmp_path):
    folder = bare_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [{"step": step, "loss": i} for i, step in enumerate((1, 2, 3, 2))])
    data = curves(folder)
    assert data["curves"]["steps"] == [1, 2, 3]
    assert panel(data, "Loss")["loss"] == [0, 3, 2]


@pytest.mark.parametrize(
    ("event", "steps", "state"),
    [
        ("stopped", 5, "stopped"),
        ("finished", 5, "finished"),
        ("resumed", 5, "unfinished"),
        ("started", 50, "finished"),
    ],
)
def test_states(tmp_path, event, steps, state):
    folder = bare_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [{"step": steps, "seconds": 1}])
    events = [{"step": 0, "event": "started", "steps": 50}]
    events += [{"step": steps, "event": name} for name in ("stopped", event, "checkpoint")]
    write_lines(folder / "events.jsonl", events)
    data = curves(folder)
    assert data["state"] == state
    assert any("left" in part for part in data["summary"]) == (state == "unfinished")


def test_points_of_a_long_run_are_means(tmp_path, monkeypatch):
    monkeypatch.setattr(series, "MAX_POINTS", 3)
    folder = bare_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [{"step": n, "loss": None if n == 2 else n} for n in range(1, 8)])
    data = curves(folder)
    assert (data["curves"]["per_point"], data["curves"]["steps"]) == (3, [3, 6, 7])
    assert panel(data, "Loss")["loss"] == [2, 5, 7]


def test_too_many_bytes_of_video(tmp_path):
    """Every second step goes first, but not the newest one; then the last prompts."""
    for name in ("base", *(f"step_{step:06}" for step in range(1, 6))):
        for number in range(3):
            file = tmp_path / "samples" / name / f"{number:03}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(2**20))
    everything = build_samples(tmp_path)
    assert (everything["steps"], everything["note"]) == ([1, 2, 3, 4, 5], "")

    few = build_samples(tmp_path, 12 * 2**20)
    assert few["steps"] == [1, 3, 5]
    assert few["note"].startswith(
        "All videos together have 18 MiB, and a page holds at most 12 MiB. So it shows 3 of 5"
    )
    fewer = build_samples(tmp_path, 4 * 2**20)
    assert fewer["steps"] == [5]
    assert [row["caption"] for row in fewer["rows"]] == ["sample 000", "sample 001"]
    assert build_samples(tmp_path, 1)["rows"] == []


def test_a_missing_video_and_other_folders(tmp_path):
    write_video(tmp_path / "samples" / "step_000010" / "000.mp4")
    write_video(tmp_path / "samples" / "base" / "001.mp4")
    (tmp_path / "samples" / "step_000020").mkdir()
    (tmp_path / "samples" / "step_x").mkdir()
    samples = build_samples(tmp_path)
    assert samples["steps"] == [10]
    assert [(bool(row["base"]), bool(row["lora"][0])) for row in samples["rows"]] == [(True, False), (False, True)]


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(InputError, match="none: no such folder; expected the folder of a training run"):
        write_report(tmp_path / "none")
    with pytest.raises(InputError, match=r"contains no config\.yaml; expected the folder of a training run"):
        write_report(tmp_path)
    folder = bare_run(tmp_path / "run")
    (folder / "config.yaml").write_text("- a\n")
    with pytest.raises(InputError, match=r"config\.yaml: expected sections with fields"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_the_page(run, page):
    """Without a network. The browser prints the page as its program has made it, and the messages of its console."""
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", (run / "report.html").as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "source: chrome://" not in line]
    assert messages == []  # but for those of the browser's own pages
    shown = re.sub(r"(?s)<script.*?</script>", "", done.stdout)
    assert f"step {STEPS} of 50" in shown
    assert shown.count("<figure>") == shown.count("</figure>") == 8 + 6 + 2
    assert shown.count('class="main-svg"') >= 14
    assert shown.count('src="data:video/mp4') == 4
    assert "a disc &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;&amp;amp;" in shown
    assert "<b>" not in shown
