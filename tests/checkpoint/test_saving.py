"""Saving checkpoints, and what happens when it fails."""

import logging
import os
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import virtual_devices
from helpers.checkpoints import METADATA, names, state
from helpers.paths import ROOT

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.errors import InputError, NonFiniteLoss


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value):
    arrays = state(1)
    arrays["moment"] = arrays["moment"].at[3].set(value)
    with Checkpoints(tmp_path, max_to_keep=3) as checkpoints:
        with pytest.raises(NonFiniteLoss, match="step 1: moment has values that are not finite"):
            checkpoints.save(1, arrays, METADATA)
        assert names(tmp_path) == []


LIMITED = """
import resource, sys
from pathlib import Path
import jax
from tfm_jax.cli import command
from tfm_jax.errors import InputError
from tfm_jax.checkpoint import Checkpoints

def main(argv):
    arrays = {"x": jax.random.normal(jax.random.key(0), (200, 100))}
    folders = [Path(argv[0], name) for name in ("error", "again", "end")]
    for folder in folders:
        with Checkpoints(folder, max_to_keep=1) as checkpoints:
            checkpoints.save(1, arrays, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    for folder in folders[:-1]:
        try:
            with Checkpoints(folder, max_to_keep=1) as checkpoints:
                checkpoints.save(2, arrays, {})
                if folder.name == "error":
                    raise InputError("something else")
                checkpoints.save(3, arrays, {})
        except InputError as error:
            print(error)
    with Checkpoints(folders[-1], max_to_keep=1) as checkpoints:
        checkpoints.save(2, arrays, {})

command.run(main)
"""
"""Saves with a limit on the size of files, which fails in Orbax's threads like a full disk."""


def test_a_failed_write_is_one_line_and_loses_nothing(tmp_path):
    """It is reported at the end, by the next save, or while another error ends the program."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        env=virtual_devices.environment(1) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    failed = "writing failed: File too large; last complete checkpoint: step 1\n"
    assert done.stderr == f"error: {tmp_path / 'end'}: {failed}"
    note, other, again = done.stdout.splitlines(keepends=True)
    assert note.startswith(f"note: {tmp_path / 'error'}: the last save failed: ")
    assert other == "something else\n"
    assert again == f"{tmp_path / 'again'}: {failed}"
    for folder in tmp_path.iterdir():
        with Checkpoints(folder, max_to_keep=1) as checkpoints:
            assert checkpoints.steps == [1]
            arrays = checkpoints.restore().arrays
            checkpoints.save(2, arrays, {})
        assert names(folder) == ["2"]
        with Checkpoints(folder) as checkpoints:
            np.testing.assert_array_equal(checkpoints.restore().arrays["x"], arrays["x"])


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Checkpoints(tmp_path / "file" / "checkpoints", max_to_keep=1) as checkpoints,
        pytest.raises(OSError, match="file"),
    ):
        checkpoints.save(1, state(1), METADATA)


def test_a_lost_folder_leaves_no_thread(folder):
    """As on a disk that becomes read-only: the program must end instead of waiting for threads."""
    threads = set(threading.enumerate())
    with Checkpoints(folder, max_to_keep=9) as checkpoints:
        checkpoints.save(3, state(3), METADATA)
        while 3 not in checkpoints.steps:
            time.sleep(0.01)
        folder.rename(folder.with_name("elsewhere"))
        folder.write_text("")
        with pytest.raises(OSError, match="directory"):
            checkpoints.save(4, state(4), METADATA)
    # The workers of asyncio are idle and end with the program.
    assert all(thread.daemon or "asyncio" in thread.name for thread in set(threading.enumerate()) - threads)


def test_a_step_before_the_newest_is_refused(folder):
    """Orbax would skip it silently."""
    with Checkpoints(folder, max_to_keep=3) as checkpoints:
        for step in (0, 1, 2):
            with pytest.raises(InputError, match=f"already contains step 2; expected only steps before {step}"):
                checkpoints.save(step, state(step), METADATA)


def test_what_orbax_logs():
    def logged(module: str, message: str, error: Exception | None) -> logging.LogRecord | None:
        path = os.path.join("site-packages", "orbax", "checkpoint", f"{module}.py")
        exc_info = (type(error), error, None) if error else None
        record = logging.LogRecord("absl", logging.ERROR, path, 1, message, ("there",), exc_info)
        return record if logging.getLogger("absl").filter(record) else None

    assert logged("future", "failed: %s", OSError("full")) is None
    kept = logged("storage_backend", "Failed to remove checkpoint (%s)", OSError("busy"))
    assert kept.getMessage() == "Failed to remove checkpoint (there): busy"
    assert kept.exc_info is None
