"""Train a LoRA with temporal-aware flow matching on prepared clips.

    tfm-train --config wan2.1_t2v_1.3b --train.output=runs/my_run [--resume]

Ctrl-C and SIGTERM save a checkpoint and end the program with exit code 75; a second signal ends it at once.

To train on several hosts, start the program once on each of them. srun and TPU pods are recognised; elsewhere set
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. All hosts must see the same files.
"""

from collections.abc import Sequence
from pathlib import Path

from tfm_jax import processes
from tfm_jax.cli import command
from tfm_jax.config import section
from tfm_jax.train.loop import TrainRun, train


@section
class Options:
    config: Path
    """YAML file, or the name of a shipped configuration such as wan_tiny."""
    resume: bool = False
    """Continue from the newest checkpoint in train.output; without a checkpoint, start the run."""
    run: TrainRun


def execute(argv: Sequence[str]) -> None:
    line = command.parse(Options, argv, "tfm-train", __doc__)
    with processes.distributed():  # bad values are reported once for all processes
        options = line.options()
        train(options.run, options.resume)


def main() -> None:
    command.run(execute)
