"""Sample videos from a Wan2.1 model, with or without a LoRA.

    tfm-sample --config wan2.1_t2v_1.3b --sampling.prompts=prompts.txt --sampling.lora=lora.safetensors \\
        --sampling.output=samples/
    tfm-sample --config wan2.1_t2v_1.3b --prompt="A red kite dives over the dunes." --sampling.solver=unipc

Each video is saved as soon as it is done. Ctrl-C and SIGTERM stop the program after the current step with exit code 75;
a second signal ends it at once. To make the missing videos, run the same command again.

All devices are used. To use several hosts, start the program on each of them, as described in tfm-train --help; all of
them must share a filesystem.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tfm_jax import compile_cache, processes
from tfm_jax.cli import command
from tfm_jax.config import section
from tfm_jax.sampling.comparing import compare
from tfm_jax.sampling.pipeline import SampleRun, sample


@section
class Options:
    config: Path
    """YAML file, or the name of a shipped configuration such as wan_tiny."""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    """A single prompt, instead of the file; the same as --sampling.prompt."""
    compare: bool = False
    """Sample the base model and the LoRA from the same noise, and write both side by side into each video."""
    run: SampleRun


def execute(argv: Sequence[str]) -> None:
    line = command.parse(Options, argv, "tfm-sample", __doc__)
    compile_cache.enable()
    with processes.distributed():  # invalid values are reported once for all processes
        options = line.options()
        run = options.run
        if options.prompt is not None:
            run = dataclasses.replace(run, sampling=dataclasses.replace(run.sampling, prompt=options.prompt))
        if options.compare:
            compare(run)
        else:
            sample(run)


def main() -> None:
    command.run(execute)
