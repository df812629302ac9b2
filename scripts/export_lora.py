"""Write the LoRA of a training run as one safetensors file.

    python scripts/export_lora.py runs/tfm_1.3b lora.safetensors [--dialect=comfy]

comfy: diffusers, ComfyUI and DiffSynth load it. diffsynth: what the official TFM release writes. diffusers: with the
names of diffusers. kohya: musubi-tuner and programs that expect kohya's names.
"""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from tfm_jax import cli
from tfm_jax.lora.files import DIALECTS
from tfm_jax.train.export import export

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("run", type=Path, help="train.output of the run")
    parser.add_argument("file", type=Path, help="safetensors file to write")
    parser.add_argument("--dialect", default="comfy", choices=DIALECTS, help="names in the file (default: comfy)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="type of the factors (default: bfloat16)")
    parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest that is undamaged)")
    options = parser.parse_args(argv)
    step, count = export(options.run, options.file, options.dialect, DTYPES[options.dtype], options.step)
    print(f"{options.file}: {count} adapters after step {step} ({options.dialect}, {options.dtype})")


if __name__ == "__main__":
    cli.run(main)
