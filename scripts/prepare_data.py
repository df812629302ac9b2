"""Encode clips and captions once, for training.

    python scripts/prepare_data.py --config configs/wan2.1_t2v_1.3b.yaml --data.source=clips/ --data.path=latents/

`data.source` has mp4 files and metadata.csv with the columns `video` and `prompt`.
"""

from collections.abc import Sequence

from tfm_jax import cli, config
from tfm_jax.data.prepare import PrepareRun, prepare


def main(argv: Sequence[str]) -> None:
    run = config.parse(PrepareRun, argv, "prepare_data.py", __doc__ or "")
    count = prepare(run)
    print(f"{run.data.path}: {count} clips")


if __name__ == "__main__":
    cli.run(main)
