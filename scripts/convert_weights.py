"""Convert Wan2.1 weights between layouts: Diffusers, original (Wan-AI), and our own, which loads fastest.

    python scripts/convert_weights.py weights/Wan2.1-T2V-1.3B weights/wan-1.3b --to=tfm_jax --dtype=bfloat16

Streams tensor by tensor: a model of any size converts in little memory. It converts whichever networks the source has
(transformer, vae, text_encoder), and copies the tokenizer and the configuration of the scheduler.
"""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from tfm_jax import cli
from tfm_jax.errors import InputError
from tfm_jax.files import check_new_directory
from tfm_jax.inputs import read_json
from tfm_jax.wan.components import COMPONENTS
from tfm_jax.wan.saving import find_scheduler, save_model
from tfm_jax.wan.sources import SIDECAR_SUFFIX, find_source_or_none
from tfm_jax.wan.tokenizer import find_tokenizer

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("source", type=Path, help="directory of weights in any layout")
    parser.add_argument("target", type=Path, help="directory to write; must not exist or be empty")
    parser.add_argument("--to", required=True, choices=["diffusers", "original", "tfm_jax"], help="layout to write")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=DTYPES,
        help="type of the kernels; the autoencoder stays float32 (default: bfloat16)",
    )
    options = parser.parse_args(argv)

    check_new_directory("target", options.target)
    if options.target.resolve().is_relative_to(options.source.resolve()):
        raise InputError(f"target={options.target}: inside of the source {options.source}; expected another place")
    sources = [source for component in COMPONENTS if (source := find_source_or_none(options.source, component))]
    tokenizer, scheduler = find_tokenizer(options.source), find_scheduler(options.source)
    if not sources:
        raise InputError(f"{options.source}: no network of Wan2.1 found; expected a Diffusers or original layout")
    with tqdm(unit="B", unit_scale=True, desc="written") as bar:

        def progress(name: str, written: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(written)

        dtype = DTYPES[options.dtype]
        save_model(sources, tokenizer, options.target, options.to, dtype, scheduler=scheduler, progress=progress)
    found = [source.component.name for source in sources]
    found += [name for name, file in (("tokenizer", tokenizer), ("scheduler", scheduler)) if file]
    print(f"{options.target}: {', '.join(found)} ({options.to} layout, {options.dtype})")
    for file in sorted(options.target.glob(f"*{SIDECAR_SUFFIX}")):
        print(f"{file}: {', '.join(read_json(file))} of this model; other programs do not read it and use Wan2.1's own")


if __name__ == "__main__":
    cli.run(main)
