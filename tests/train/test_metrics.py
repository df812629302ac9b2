"""What a run reports: metrics.jsonl and the console."""

import resource
import time

import jax.numpy as jnp
import pytest

from tfm_jax.errors import NonFiniteLoss, describe
from tfm_jax.files import replacing
from tfm_jax.train.metrics import Metrics, read_metrics


def test_a_bad_step_ends_a_run_that_cannot_skip_it(tmp_path):
    """The lines stay valid JSON, which has no NaN. `flush` writes the step after the bad one."""
    with Metrics(tmp_path / "metrics.jsonl", 0, 4, 2, 1) as metrics:
        metrics.add(1, {"loss": jnp.float32(1)}, [3, 4])
        metrics.add(2, {"grad_norm": jnp.float32(jnp.inf), "loss": jnp.float32(jnp.nan)}, [5, 6])
        message = (
            r"step 2: the loss is nan and the grad_norm is inf; clips of this step: 5, 6 \(bad steps in a row: 1\)"
        )
        with pytest.raises(NonFiniteLoss, match=message):
            metrics.add(3, {"loss": jnp.float32(2)}, [7, 8])
        metrics.flush()
    bad = {"step": 2, "loss": None, "grad_norm": None, "skipped": True, "clips": ["5", "6"]}
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1}, bad, {"step": 3, "loss": 2}]


def test_the_report_counts_bad_steps(tmp_path, capsys):
    """The loss may be finite when the update is not. The console names only the first clips."""
    report = {"loss": jnp.float32(1)}
    with Metrics(tmp_path / "m", 0, 9, 2, 1, max_bad_steps=2, clip_name="{}.mp4".format) as metrics:
        metrics.add(1, report | {"bad_steps": jnp.int32(1)}, range(10))
        metrics.add(2, report | {"bad_steps": jnp.int32(0)}, [1])
        metrics.add(3, report | {"bad_steps": jnp.int32(2)}, [2])
        with pytest.raises(NonFiniteLoss, match=r"step 3: the update is not finite; clips .*: 2\.mp4 .* row: 2"):
            metrics.flush()
    line = "step 1/9  skipped: the update is not finite; clips of this step: 0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4, 5.mp4, "
    assert capsys.readouterr().err.startswith(line + "6.mp4, 7.mp4 and 2 more\nstep 2/9  loss 1")
    assert [line.get("skipped", False) for line in read_metrics(tmp_path / "m")] == [True, False, True]


def test_the_remaining_time_is_estimated_from_steps_after_the_first(tmp_path, capsys, monkeypatch):
    now = iter([1000.0, 1004.0])  # the end of the first step, then of the third
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with Metrics(tmp_path / "metrics.jsonl", 0, 10, 3, log_every=3) as metrics:
        for step in range(1, 5):
            metrics.add(step, {"loss": jnp.float32(1)}, [])
    assert capsys.readouterr().err == "step 3/10  loss 1  1.5 clips/s  ETA 0:00:14\n"


def test_a_full_disk(tmp_path):
    """A limit on the size of files fails like a full disk: the error names the file, and the old file stays whole."""
    (tmp_path / "config.yaml").write_text("old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, 99, 2, log_every=99)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(OSError, match="File too large") as lines, metrics:
            [metrics.add(step, {"loss": jnp.float32(1)}, []) for step in range(1, 9)]
        with pytest.raises(OSError, match="File too large") as whole, replacing(tmp_path / "config.yaml") as scratch:
            scratch.write_text("new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert describe(lines.value) == (f"{tmp_path}/metrics.jsonl: File too large", 2)
    assert describe(whole.value) == (f"{tmp_path}/config.yaml: File too large", 2)
    assert (tmp_path / "config.yaml").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl"]
