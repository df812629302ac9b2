"""Orbax, which writes the arrays in the background, each process its part. No other file imports it."""

import logging
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

_training: Any = ocp.training  # its annotations reject arguments that its documentation passes


def open_writer(directory: Path, max_to_keep: int | None) -> Any:
    """Orbax's manager of a folder of checkpoints. It removes what an earlier run left unfinished."""
    context = ocp.Context()
    # If the folder cannot be made in the background, threads wait 20 minutes for it and keep the process alive.
    context.asynchronous.create_directories_asynchronously = False
    return _training.Checkpointer(
        directory,
        context=context,
        # Save whenever asked: the default skips a step while the previous one is still being written.
        save_decision_policy=_training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=_training.preservation_policies.LatestN(max_to_keep),
        cleanup_tmp_directories=True,
    )


def _filter_log(record: logging.LogRecord) -> bool:
    """Whether absl's logger, which Orbax uses, prints a record.

    Every thread of Orbax logs a failure with its traceback, although the failure is raised as well. The exception is an
    old checkpoint that cannot be removed: that is logged only, and here becomes one line.
    """
    if "orbax" not in Path(record.pathname).parts:
        return True
    if record.exc_info and record.module == "storage_backend":
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = None
        return True
    return record.levelno < logging.ERROR


logging.getLogger("absl").addFilter(_filter_log)
