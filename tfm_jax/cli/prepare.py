"""Encode clips and their prompts once, before training.

    tfm-prepare --config wan2.1_t2v_1.3b --data.source=clips/ --data.path=latents/ --dry-run
    tfm-prepare --config wan2.1_t2v_1.3b --data.source=clips/ --data.path=latents/

data.source lists the clips and their prompts: a folder with metadata.csv, metadata.json or metadata.jsonl; such a file;
a folder of pairs such as a.mp4 and a.txt; or ShareGPT4Video's sharegpt4video_40k.jsonl. Videos that are missing, too
short or damaged are left out; rejected.jsonl in data.path lists them with the reason.

A run that was stopped is continued by the same command. All local devices are used. To use several hosts, start the
program on each of them, as described in tfm-train --help; all of them must share a filesystem.

    tfm-prepare --config wan2.1_t2v_1.3b --data.path=latents/ --inspect

describes what was written, and draws some of it into contact_sheet.png in data.path.
"""

from collections.abc import Sequence
from pathlib import Path

from tfm_jax import compile_cache, processes
from tfm_jax.cli import command
from tfm_jax.config import section
from tfm_jax.data.dry_run import dry_run
from tfm_jax.data.format import REJECTED
from tfm_jax.data.inspection import inspect
from tfm_jax.data.prepare import Prepared, PrepareRun, prepare
from tfm_jax.errors import InputError


@section
class Options:
    config: Path
    """YAML file, or the name of a shipped configuration such as wan_tiny."""
    dry_run: bool = False
    """Encode nothing. Read the headers of all files, and report what would be encoded and what would be left out."""
    inspect: bool = False
    """Encode nothing. Print statistics of the finished data.path, and draw some clips, decoded from their latents, into
    contact_sheet.png there."""
    run: PrepareRun


def execute(argv: Sequence[str]) -> None:
    line = command.parse(Options, argv, "tfm-prepare", __doc__)
    compile_cache.enable()
    with processes.distributed():  # invalid values are reported once for all processes
        options = line.options()
        if options.dry_run and options.inspect:
            raise InputError("--dry-run and --inspect: expected one of them")
        if not (options.dry_run or options.inspect):
            _report(options.run.data.path, prepare(options.run))
        elif processes.is_first():
            dry_run(options.run) if options.dry_run else inspect(options.run)


def _report(output: Path, prepared: Prepared | None) -> None:
    """Print the result in the process that has it, the first one."""
    if prepared is None:
        return
    written, rejected = prepared
    clips = f"{written} clip{'s' if written > 1 else ''}"
    if rejected:
        clips = f"{clips}; {rejected} video{'s' if rejected > 1 else ''} rejected: see {output / REJECTED}"
    print(f"{output}: {clips}")


def main() -> None:
    command.run(execute)
