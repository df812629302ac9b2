"""Train the embedded model, a tiny Wan2.1, from scratch on clips of moving shapes.

    python scripts/pretrain.py runs/wan_tiny

The first stage trains the autoencoder, the second the transformer and the text encoder. The clips, the logs of both
stages and the model (in Diffusers layout) are written into one folder. A complete stage is not repeated; to run it
again, remove its result.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from tyro.conf import Positional

from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, Seed, section
from tfm_jax.files import check_output_directory
from tfm_jax.moving_shapes.pretraining.recipe import Recipe, pretrain


@section
class Options:
    output: Positional[NonEmptyPath]
    """Folder to write."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the recipe's clips and steps to use."""
    seed: Seed = 0
    """Seed of the clips, the initial weights and the noise."""


def execute(argv: Sequence[str]) -> None:
    options = command.parse(Options, argv, "python scripts/pretrain.py", __doc__).options()
    check_output_directory("output", options.output)
    pretrain(options.output, Recipe().shortened(options.share), options.seed)


def main() -> None:
    command.run(execute)
