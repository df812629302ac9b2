"""Fine-tune the embedded model with flow matching, with TFM and with what lies between them, and compare the motion.

    python scripts/study.py

trains every arm with every seed, samples held-out captions, measures them and writes docs/study.md with its pictures.
Started again, it goes on where it was stopped; with more arms or seeds, it adds them. Started several times at once,
the processes share the runs. Any field of the configuration can be given too, such as --optimizer.learning_rate=1e-3.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from tfm_jax import cli, config
from tfm_jax.errors import InputError
from tfm_jax.files import check_output_directory
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.report import write_report
from tfm_jax.moving_shapes.study.runs import Size, Study, StudyRun, run_study

OWN = ("train.output", "train.steps", "train.seed", "sampling.output", "sampling.prompts", "sampling.lora",
       "sampling.seed", "objective.kind", "data.source", "data.path")  # fmt: skip
"""Fields that the study sets itself."""


def main(argv: Sequence[str]) -> None:
    full = Size()
    parser = cli.parser(__doc__)
    parser.add_argument("--config", default="configs/wan_tiny.yaml", help="model, clips, LoRA, optimizer, sampling")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of all runs and results.jsonl")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of study.md")
    parser.add_argument("--arms", default=",".join(full.arms), help=f"of {', '.join(protocol.ARMS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=full.seeds, help="training seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=full.clips, help="to train on (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=full.prompts, help="captions to sample (default: %(default)s)")
    parser.add_argument("--reference", type=int, default=full.reference, help="real clips (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=full.rounds, help="measuring cost (default: %(default)s)")
    parser.add_argument("--laws", default=",".join(full.laws), help="of motion, of all clips (default: %(default)s)")
    options, fields = parser.parse_known_args(argv)
    for field in fields:
        if field.partition("=")[0].removeprefix("--") in OWN:
            raise InputError(f"{field}: the study sets it; expected another field")
    run = config.parse(
        StudyRun, ["--config", options.config, f"--train.steps={options.steps}", *fields], "study.py", ""
    )
    size = Size(
        tuple(options.arms.split(",")), options.seeds, options.clips, options.prompts, options.reference,
        options.rounds, tuple(options.laws.split(",")),
    )  # fmt: skip
    check_output_directory("--output", options.output)
    study = Study(run, size, options.output)
    results = run_study(study)
    print(
        f"done: see {write_report(study, results, options.docs, f'python scripts/study.py {shlex.join(argv)}'.strip())}"
    )


if __name__ == "__main__":
    cli.run(main)
