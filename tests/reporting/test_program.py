"""tfm-report from the command line."""

import http.client
import os
import signal
import threading

import pytest
from helpers.report_runs import bare_run

from tfm_jax.cli import report
from tfm_jax.reporting.server import make_server


@pytest.fixture
def run(tmp_path):
    return bare_run(tmp_path / "run")


def test_the_page_is_written(call, run):
    outcome = call("report", run)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"{run}/report.html: ")
    names = ["config.yaml", "events.jsonl", "metrics.jsonl", "report.html"]
    assert sorted(path.name for path in run.iterdir()) == names


def test_a_folder_that_is_no_run(call, tmp_path):
    outcome = call("report", tmp_path)
    expected = f"{tmp_path}: contains no config.yaml; expected the folder of a training run (its train.output)"
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"error: {expected}\n")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_the_server_and_writes_the_page_again(call, run, monkeypatch):
    """A browser sees the run while it goes on."""
    seen = []

    def watch(server):
        connection = http.client.HTTPConnection(*server.server_address, timeout=60)
        connection.request("GET", "/curves.json")
        seen.append(connection.getresponse().read().decode())
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
        os.kill(os.getpid(), signal.SIGINT)

    def start(folder, port):
        assert port == 8000
        server = make_server(folder, 0)
        threading.Thread(target=watch, args=(server,), daemon=True).start()
        return server

    monkeypatch.setattr(report, "make_server", start)
    outcome = call("report", run, "--serve")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[1].startswith("http://127.0.0.1:")
    assert "step 0 of 50" in seen[0]
    assert "step 1 of 50" in (run / "report.html").read_text(encoding="utf-8")
