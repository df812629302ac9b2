"""Sample videos from a Wan2.1 model, with or without a LoRA.

    python scripts/sample.py --config configs/wan2.1_t2v_1.3b.yaml --sampling.prompts=prompts.txt \
        --sampling.lora=lora.safetensors --sampling.output=samples/

One prompt on each line in, 000.mp4, 001.mp4, ... and contact_sheet.png out. Each video is saved as soon as it is done.
The same command again makes the videos that are missing: after Ctrl-C or SIGTERM, which stop after the step under way
(exit code 75; a second one ends the program at once), or after an error.
"""

from collections.abc import Sequence

from tfm_jax import cli, config
from tfm_jax.sampling.pipeline import SampleRun, sample


def main(argv: Sequence[str]) -> None:
    sample(config.parse(SampleRun, argv, "sample.py", __doc__ or ""))


if __name__ == "__main__":
    cli.run(main)
