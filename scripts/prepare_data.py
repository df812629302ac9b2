"""Encode clips and captions once, for training.

    python scripts/prepare_data.py --config configs/wan2.1_t2v_1.3b.yaml --data.source=clips/ --data.path=latents/

`data.source` has mp4 files and metadata.csv with the columns `video` and `prompt`. Clips that cannot be used, because
they are too short or damaged, are left out and listed in `rejected.jsonl` in `data.path`, with the reason.
"""

from collections.abc import Sequence

from tfm_jax import cli, config
from tfm_jax.data.prepare import PrepareRun, prepare
from tfm_jax.data.records import REJECTED


def main(argv: Sequence[str]) -> None:
    run = config.parse(PrepareRun, argv, "prepare_data.py", __doc__ or "")
    written, rejected = prepare(run)
    clips = f"{written} clip{'s' if written > 1 else ''}"
    if rejected:
        clips = f"{written} of {written + rejected} clips; {rejected} rejected: see {run.data.path / REJECTED}"
    print(f"{run.data.path}: {clips}")


if __name__ == "__main__":
    cli.run(main)
