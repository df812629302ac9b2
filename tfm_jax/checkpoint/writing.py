"""Write arrays with Orbax in the background; each process writes its part. No other file imports Orbax."""

import logging
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

_training: Any = ocp.training  # the annotations reject arguments that the documentation passes


def open_writer(directory: Path, max_to_keep: int | None, keep_every: int | None) -> Any:
    """Return Orbax's checkpointer for a folder. It removes what an earlier run left unfinished.

    It keeps the newest checkpoints, and those of the steps that `keep_every` divides.
    """
    context = ocp.Context()
    policies = _training.preservation_policies
    kept = [policies.LatestN(max_to_keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
    # If creating the folder failed in the background, threads would wait for 20 minutes and keep the process alive.
    context.asynchronous.create_directories_asynchronously = False
    return _training.Checkpointer(
        directory,
        context=context,
        # Save at every call: the default skips a save while the previous one is still in progress.
        save_decision_policy=_training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
    )


def _filter_log(record: logging.LogRecord) -> bool:
    """Whether absl's logger, which Orbax uses, should print a record.

    Orbax logs every failure with its traceback. These records are dropped, because the failure is also raised. Only the
    failure to remove an old checkpoint is not raised; its record is shortened to one line.
    """
    if "orbax" not in Path(record.pathname).parts:
        return True
    if record.exc_info and record.module == "storage_backend":
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = None
        return True
    return record.levelno < logging.ERROR


logging.getLogger("absl").addFilter(_filter_log)
