"""Train the embedded tiny Wan2.1 from nothing, on clips of moving shapes: autoencoder, transformer, text encoder.

    python scripts/pretrain.py runs/wan_tiny

writes the clips, the logs of both stages and the model (Diffusers layout) into a folder. A stage that is complete is
not repeated: remove its result to have it made again.
"""

from collections.abc import Sequence
from pathlib import Path

from tfm_jax import cli
from tfm_jax.errors import InputError
from tfm_jax.files import check_output_directory
from tfm_jax.moving_shapes.pretraining.recipe import Recipe, pretrain


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--share", type=float, default=1.0, help="of the clips and steps of the recipe (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not 0 < options.share <= 1:
        raise InputError(f"--share={options.share}: expected more than 0 and at most 1")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed={options.seed}: expected 0 to 4294967295")
    check_output_directory("output", options.output)
    pretrain(options.output, Recipe().shortened(options.share), options.seed)


if __name__ == "__main__":
    cli.run(main)
