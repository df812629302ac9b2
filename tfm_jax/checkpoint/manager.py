"""The checkpoints of a run: save and list them, and restore the newest undamaged one.

Orbax does not detect every change of the stored data. Each checkpoint therefore has a record (`record.py`) with a
fingerprint of every array, and the record has a checksum.
"""

from pathlib import Path
from typing import Any, NoReturn

from tfm_jax import errors, processes
from tfm_jax.checkpoint.fingerprints import summarize
from tfm_jax.checkpoint.reading import (
    MakeTarget,
    Restored,
    first_text,
    one_line,
    read_checkpoint,
    read_metadata,
)
from tfm_jax.checkpoint.record import DamagedError, make_record, to_orbax
from tfm_jax.checkpoint.trees import Arrays
from tfm_jax.checkpoint.writing import open_writer
from tfm_jax.errors import InputError, NonFiniteLoss


class Checkpoints:
    """The checkpoints of one run. Use this class as a context manager, which waits for the last save when it exits.

    With `max_to_keep`, the object is a writer: it keeps only that many of the newest checkpoints, and those of the
    steps that `keep_every` divides; it renames damaged ones, and removes what a killed run left unfinished. A run may
    have only one writer at a time. Without `max_to_keep`, the object is a reader, which changes nothing and may be used
    while the run is training.

    In a run of several processes, all processes must make the same calls, and they get the same results.
    """

    def __init__(self, directory: Path, max_to_keep: int | None = None, keep_every: int | None = None):
        self.directory = directory.absolute()
        self._max_to_keep = max_to_keep
        self._keep_every = keep_every
        self._writer: Any = None

    def save(self, step: int, arrays: Arrays, metadata: dict[str, Any]) -> None:
        """Save `arrays` and the JSON data `metadata` in the background, as the checkpoint after `step` steps.

        Raises:
            NonFiniteLoss: an array has a value that is not finite; nothing is written.
            InputError: a checkpoint of this step or of a later one exists.
            InputError, OSError: this save or the previous one cannot be written.
        """
        summaries = summarize(arrays)
        for name, summary in summaries.items():
            if not summary.is_finite:
                raise NonFiniteLoss(f"step {step}: {name} has values that are not finite; no checkpoint is written")
        if processes.is_first() and self.steps and self.steps[-1] >= step:  # Orbax would skip the save silently
            newest = self.steps[-1]
            raise InputError(f"{self.directory}: already contains step {newest}; expected only steps before {step}")
        record = make_record(step, arrays, summaries, metadata)
        try:
            # Open the writer only now: damaged checkpoints must be renamed before it cleans up.
            self._writer = self._writer or open_writer(self.directory, self._max_to_keep, self._keep_every)
            self._writer.save_async(step, arrays, custom_metadata=to_orbax(record))
        except Exception as error:
            self._raise_failed_write(error)

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints in ascending order. Some of these checkpoints may be damaged."""
        # Orbax gives a checkpoint its final name only when it is complete.
        return sorted(int(path.name) for path in self.directory.glob("*") if _is_step(path.name))

    @property
    def damaged(self) -> list[Path]:
        """The damaged checkpoints that a writer has renamed."""
        return sorted(self.directory.glob("*.damaged*"))

    def newest_metadata(self) -> dict[str, Any] | None:
        """Return the metadata of the newest checkpoint that has undamaged metadata; None if there is none.

        Its arrays are not read, so they may be damaged.

        Raises:
            InputError: version 0.1.0 wrote the checkpoint.
        """
        found = (read_metadata(self.directory / str(step)) for step in reversed(self.steps))
        return next((metadata for metadata in found if metadata is not None), None)

    def restore(self, make_target: MakeTarget | None = None, step: int | None = None) -> Restored | None:
        """Read the newest undamaged checkpoint, or that of `step`. Return None if there are no checkpoints.

        Without `step`, each damaged checkpoint found on the way is reported in one line, and a writer renames it. If
        all checkpoints are damaged, return None.

        Args:
            make_target: called with the metadata of a checkpoint. Returns the abstract arrays to load, with their
                shardings, or raises InputError if the checkpoint belongs to another run. By default, all arrays are
                loaded onto one device.

        Raises:
            InputError: `make_target` raised it, the arrays of the checkpoint differ from those of the target, version
                0.1.0 wrote the checkpoint, or the checkpoint of `step` is damaged or not among the existing ones.
        """
        if step is not None and self.steps:
            return self._restore_step(step, make_target)
        tried: set[int] = set()
        # Process 0 chooses, because processes may see different listings of a shared folder for a while.
        while (newest := int(first_text(str(max(set(self.steps) - tried, default=-1))))) >= 0:
            try:
                return self._read(newest, make_target)
            except DamagedError as damage:
                self._report_damage(newest, str(damage))
            tried.add(newest)
        return None

    def _restore_step(self, step: int, make_target: MakeTarget | None) -> Restored:
        if step not in self.steps:
            choice = ", ".join(map(str, self.steps))
            raise InputError(f"{self.directory}: no checkpoint of step {step}; expected one of {choice}")
        try:
            return self._read(step, make_target)
        except DamagedError as damage:
            reason = str(damage)
        others = ", ".join(str(other) for other in self.steps if other != step and self._is_intact(other, make_target))
        raise InputError(f"{self.directory / str(step)}: damaged: {reason}; undamaged steps: {others or 'none'}")

    def _is_intact(self, step: int, make_target: MakeTarget | None) -> bool:
        try:
            self._read(step, make_target)
        except DamagedError:
            return False
        return True

    def _read(self, step: int, make_target: MakeTarget | None) -> Restored:
        return read_checkpoint(self.directory / str(step), make_target)

    def _report_damage(self, step: int, reason: str) -> None:
        """Print that a checkpoint is damaged. A writer also renames it, so that its name is no longer a number."""
        checkpoint = self.directory / str(step)
        if self._max_to_keep is None:
            processes.print_once(f"note: {checkpoint} is damaged and not used: {reason}")
            return
        if processes.is_first():
            renamed, number = checkpoint.with_name(f"{step}.damaged"), 1
            while renamed.exists():
                number += 1
                renamed = checkpoint.with_name(f"{step}.damaged-{number}")
            checkpoint.rename(renamed)
            processes.print_once(f"note: {checkpoint} is damaged and now named {renamed.name}: {reason}")
        processes.barrier(f"checkpoint {step} is renamed")

    def _raise_failed_write(self, error: Exception) -> NoReturn:
        failure = errors.failed_write(error)
        if failure is None:
            raise error
        last = f"step {self.steps[-1]}" if self.steps else "none"
        raise InputError(f"{self.directory}: writing failed: {failure}; last complete checkpoint: {last}") from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes, which may not be closing if there was an error.
        if self._writer is None or (kind is not None and processes.is_distributed()):
            return
        try:
            self._writer.close()
        except Exception as error:
            if kind is None:
                self._raise_failed_write(error)
            # The exception that ended the block takes precedence, so only print this one.
            processes.print_once(f"note: {self.directory}: the last save failed: {one_line(error)}")


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and name == str(int(name))
