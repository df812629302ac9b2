"""Sample videos from a Wan2.1 model, with or without a LoRA.

    tfm-sample --config wan2.1_t2v_1.3b --sampling.prompts=prompts.txt --sampling.lora=lora.safetensors \\
        --sampling.output=samples/

Each video is saved as soon as it is done. Ctrl-C and SIGTERM stop the program after the current step with exit code 75;
a second signal ends it at once. To make the missing videos, run the same command again.
"""

from collections.abc import Sequence
from pathlib import Path

from tfm_jax import compile_cache
from tfm_jax.cli import command
from tfm_jax.config import section
from tfm_jax.sampling.pipeline import SampleRun, sample


@section
class Options:
    config: Path
    """YAML file, or the name of a shipped configuration such as wan_tiny."""
    run: SampleRun


def execute(argv: Sequence[str]) -> None:
    line = command.parse(Options, argv, "tfm-sample", __doc__)
    compile_cache.enable()
    sample(line.options().run)


def main() -> None:
    command.run(execute)
