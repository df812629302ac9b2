"""Train a LoRA on prepared clips, with temporal-aware flow matching by default.

    tfm-train --config wan2.1_t2v_1.3b --train.output=runs/my_run [--resume] [--profile=10:13]

After Ctrl-C or SIGTERM, the program saves a checkpoint and exits with code 75. A second signal ends it at once. To
continue a run, use the same command with --resume.

To train on several hosts, start the program on each of them. srun and TPU slices are recognised; elsewhere, set
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. All of them must share a filesystem.
"""

from collections.abc import Sequence
from pathlib import Path

from tfm_jax import compile_cache, processes
from tfm_jax.cli import command
from tfm_jax.config import section
from tfm_jax.train.loop import train
from tfm_jax.train.profiling import Profile
from tfm_jax.train.run import TrainRun


@section
class Options:
    config: Path
    """YAML file, or the name of a shipped configuration such as wan_tiny."""
    resume: bool = False
    """Continue from the newest checkpoint in train.output. If there is no checkpoint, start from step 0."""
    profile: str | None = None
    """First and last step to trace with JAX's profiler, such as 10:13. The trace goes to profile/ in train.output."""
    run: TrainRun


def execute(argv: Sequence[str]) -> None:
    line = command.parse(Options, argv, "tfm-train", __doc__)
    compile_cache.enable()
    with processes.distributed():  # invalid values are reported once for all processes
        options = line.options()
        train(options.run, options.resume, [Profile(options.profile)] if options.profile else [])


def main() -> None:
    command.run(execute)
