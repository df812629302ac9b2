"""Training runs with steps that are not finite."""

import re

import numpy as np
import pytest
from helpers.training_runs import assert_same, computed, saved, start

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.data.batches import Batches
from tfm_jax.errors import NonFiniteLoss
from tfm_jax.train.metrics import read_metrics


@pytest.fixture
def spoil(monkeypatch):
    """Put NaN into the latents of these steps, counted from 1."""

    def spoil(*steps: int) -> None:
        read_sound = Batches.read

        def read(self, step):
            batch, clips = read_sound(self, step)
            return batch._replace(latents=batch.latents * (np.nan if step + 1 in steps else 1)), clips

        monkeypatch.setattr(Batches, "read", read)

    return spoil


def test_a_bad_step_is_skipped(options, tmp_path, spoil, capsys):
    """It changes only the counters, and resuming after it changes no bit."""
    spoil(2)
    options = [*options, "--train.ema_decay=0.9"]
    whole = start([*options, f"--train.output={tmp_path}/whole"])
    assert re.search(
        r"step 2/4  skipped: the loss is nan and .*; clips of this step: \d+\.mp4, ", capsys.readouterr().err
    )
    one, two, four = (saved(whole, step) for step in (1, 2, 4))
    assert {name for name in one if (one[name] != two[name]).any()} == {"step", "bad_steps"}
    assert (two["step"], two["bad_steps"], four["bad_steps"], four["optimizer/1/count"]) == (2, 1, 0, 3)
    lines = computed(whole)
    assert [line.get("skipped", False) for line in lines] == [False, True, False, False]
    assert lines[1]["loss"] is None
    assert all(name.endswith(".mp4") for name in lines[1]["clips"])

    parts = start([*options, "--train.steps=2"])
    start(options, resume=True)
    assert_same(saved(parts, 4), four)
    assert computed(parts) == lines


def test_bad_steps_in_a_row_end_the_run(options, spoil, tmp_path):
    spoil(2, 3, 5)
    message = r"step 3: the loss is nan .*row: 2\); the adapters from before the bad steps are saved in .*run"
    options = [*options, "--train.steps=9", "--train.max_bad_steps=2", "--train.checkpoint_every=9"]
    with pytest.raises(NonFiniteLoss, match=message):
        start(options)
    (step,) = Checkpoints(tmp_path / "run" / "checkpoints").steps
    assert step == 4  # computed while the host read the report of step 3
    state = saved(tmp_path / "run", step)
    assert all(np.isfinite(array).all() for array in state.values())
    assert state["optimizer/1/count"] == 2
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_with_only_bad_steps_fails(options, tmp_path):
    """The update is not finite, although the loss and the gradient are."""
    options = [*options, "--optimizer.learning_rate=1e37", "--optimizer.weight_decay=1e3", "--train.steps=1"]
    options += ["--objective.kind=fm"]  # compiles faster
    with pytest.raises(NonFiniteLoss, match="step 1: the update_norm is inf"):
        start(options)
    state = saved(tmp_path / "run", 1)
    assert all(np.isfinite(array).all() for array in state.values())
    assert not any(array.any() for name, array in state.items() if name.endswith("lora_b"))
    message = r"the run is complete, but its last steps were skipped \(bad steps in a row: 1\)"
    with pytest.raises(NonFiniteLoss, match=message):
        start(options, resume=True)
