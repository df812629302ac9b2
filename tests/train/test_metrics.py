"""What a run reports: the files, the console, and which steps end a run."""

import json
import math
import resource
import time

import jax
import jax.numpy as jnp
import pytest

from tfm_jax.errors import NonFiniteLoss, describe
from tfm_jax.files import replacing
from tfm_jax.flops import PEAKS, peak_flops
from tfm_jax.train.metrics import Console, EventLog, MetricsFile, read_metrics
from tfm_jax.train.speed import Speed
from tfm_jax.train.watching import About, Event, Reports


def reports_of(folder, *watchers, last=4, clips=2, **options) -> Reports:
    return Reports(watchers, About(folder, 0, last, clips), **options)


def test_a_bad_step_ends_a_run_that_cannot_skip_it(tmp_path):
    """The lines stay valid JSON, which has no NaN. `flush` writes the step after the bad one."""
    with reports_of(tmp_path, MetricsFile()) as reports:
        reports.add(1, {"loss": jnp.float32(1), "loss_by_level": jnp.asarray([0.5, jnp.nan])}, [3, 4])
        reports.add(2, {"grad_norm": jnp.float32(jnp.inf), "loss": jnp.float32(jnp.nan)}, [5, 6])
        message = (
            r"step 2: the loss is nan and the grad_norm is inf; clips of this step: 5, 6 \(bad steps in a row: 1\)"
        )
        with pytest.raises(NonFiniteLoss, match=message):
            reports.add(3, {"loss": jnp.float32(2)}, [7, 8])
        reports.flush()
    good = {"step": 1, "loss": 1, "loss_by_level": [0.5, None]}
    bad = {"step": 2, "loss": None, "grad_norm": None, "skipped": True, "clips": ["5", "6"]}
    assert read_metrics(tmp_path / "metrics.jsonl") == [good, bad, {"step": 3, "loss": 2}]


def test_the_report_counts_bad_steps(tmp_path, capsys):
    """The loss may be finite when the update is not. The console names only the first clips."""
    report = {"loss": jnp.float32(1)}
    watchers = MetricsFile(tmp_path / "m"), Console(log_every=1)
    with reports_of(tmp_path, *watchers, last=9, max_bad_steps=2, clip_name="{}.mp4".format) as reports:
        reports.add(1, report | {"bad_steps": jnp.int32(1)}, range(10))
        reports.add(2, report | {"bad_steps": jnp.int32(0)}, [1])
        reports.add(3, report | {"bad_steps": jnp.int32(2)}, [2])
        with pytest.raises(NonFiniteLoss, match=r"step 3: the update is not finite; clips .*: 2\.mp4 .* row: 2"):
            reports.flush()
    line = "step 1/9  skipped: the update is not finite; clips of this step: 0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4, 5.mp4, "
    assert capsys.readouterr().err.startswith(line + "6.mp4, 7.mp4 and 2 more\nstep 2/9  loss 1")
    assert [line.get("skipped", False) for line in read_metrics(tmp_path / "m")] == [True, False, True]


def test_the_remaining_time_is_estimated_from_steps_after_the_first(tmp_path, capsys, monkeypatch):
    now = iter([1000.0, 1004.0])  # the end of the first step, then of the third
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with reports_of(tmp_path, Console(log_every=3), last=10, clips=3) as reports:
        for step in range(1, 5):
            reports.add(step, {"loss": jnp.float32(1), "update_norm": jnp.float32(1)}, [])
    assert capsys.readouterr().err == "step 3/10  loss 1  1.5 clips/s  ETA 0:00:14\n"


def test_the_speed_of_a_step(monkeypatch):
    """Four clips in two seconds, on a chip with a known peak. Restarting the clock leaves out a pause."""
    now = iter([10.0, 12.0, 100.0, 101.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr("tfm_jax.train.speed.peak_flops", lambda kind: 1e12)
    speed = Speed(4, jax.devices()[:1])
    first = speed.measure(10**12, 0.5)
    assert first == {"seconds": 2, "clips_per_second": 2, "data_wait": 0.5, "tflops": 0.5, "mfu": 0.5}
    speed.restart()
    assert speed.measure(10**12, 0.0)["seconds"] == 1


def test_peaks_of_devices():
    assert peak_flops("TPU v5 lite") == PEAKS["v5e"]
    assert peak_flops("TPU7x") == PEAKS["tpu7x"] / 2
    assert peak_flops("NVIDIA H100 PCIe") is None


def test_the_event_log(tmp_path):
    with reports_of(tmp_path, EventLog()) as reports:
        reports.tell(Event("started", 0))
        reports.add(1, {"loss": jnp.float32(math.nan)}, [5])
        with pytest.raises(NonFiniteLoss):
            reports.flush()
        reports.tell(Event("stopped", 1, {"reason": "SIGTERM"}))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event.get("steps") for event in events] == [4, None, None]
    assert [(event["step"], event["event"], event["detail"]) for event in events] == [
        (0, "started", ""), (1, "skipped", "the loss is nan; clips of this step: 5"), (1, "stopped", "SIGTERM"),
    ]  # fmt: skip
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["devices"]["platform"] == "cpu"


def test_a_full_disk(tmp_path):
    """A limit on the size of files fails like a full disk: the error names the file, and the old file stays whole."""
    (tmp_path / "config.yaml").write_text("old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    reports = reports_of(tmp_path, MetricsFile(), last=99)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(OSError, match="File too large") as lines, reports:
            [reports.add(step, {"loss": jnp.float32(1)}, []) for step in range(1, 9)]
        with pytest.raises(OSError, match="File too large") as whole, replacing(tmp_path / "config.yaml") as scratch:
            scratch.write_text("new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert describe(lines.value) == (f"{tmp_path}/metrics.jsonl: File too large", 2)
    assert describe(whole.value) == (f"{tmp_path}/config.yaml: File too large", 2)
    assert (tmp_path / "config.yaml").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl"]
