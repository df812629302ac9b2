"""Train a LoRA with temporal-aware flow matching on prepared clips.

    python scripts/train.py --config configs/wan2.1_t2v_1.3b.yaml --train.output=runs/my_run [--resume]

Every field of the configuration can be set on the command line; `--help` lists them. `--resume` continues from the
newest checkpoint in train.output, or starts if there is none. Ctrl-C and SIGTERM save a checkpoint and end the program
with exit code 75; a second one ends it at once.

On several machines start it once on each (`srun` and TPU pods are recognised; elsewhere set JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID); all of them see the same files.
"""

from collections.abc import Sequence
from functools import partial

from tfm_jax import cli, config, hosts
from tfm_jax.train.loop import TrainRun, train


def main(argv: Sequence[str]) -> None:
    options = [token for token in argv if token != "--resume"]
    parse = partial(config.parse, TrainRun, options, "train.py", __doc__ or "")
    if not {"-h", "--help"}.isdisjoint(options):
        parse()  # prints and ends, without the other processes
    with hosts.distributed():
        train(parse(), resume="--resume" in argv)


if __name__ == "__main__":
    cli.run(main)
