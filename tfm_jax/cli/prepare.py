"""Encode clips and their prompts once, before training.

    tfm-prepare --config wan2.1_t2v_1.3b --data.source=clips/ --data.path=latents/

data.source lists the clips and their prompts: a folder with metadata.csv, metadata.json or metadata.jsonl; such a file;
a folder of pairs such as a.mp4 and a.txt; or ShareGPT4Video's sharegpt4video_40k.jsonl. Clips that are too short or
damaged are left out; rejected.jsonl in data.path lists them with the reason.
"""

from collections.abc import Sequence
from pathlib import Path

from tfm_jax.cli import command
from tfm_jax.config import section
from tfm_jax.data.prepare import PrepareRun, prepare
from tfm_jax.data.records import REJECTED


@section
class Options:
    config: Path
    """YAML file, or the name of a shipped configuration such as wan_tiny."""
    run: PrepareRun


def execute(argv: Sequence[str]) -> None:
    run = command.parse(Options, argv, "tfm-prepare", __doc__).options().run
    written, rejected = prepare(run)
    clips = f"{written} clip{'s' if written > 1 else ''}"
    if rejected:
        clips = f"{written} of {written + rejected} clips; {rejected} rejected: see {run.data.path / REJECTED}"
    print(f"{run.data.path}: {clips}")


def main() -> None:
    command.run(execute)
