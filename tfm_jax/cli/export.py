"""Write the LoRA of a training run as one safetensors file.

tfm-export runs/my_run lora.safetensors [--dialect=comfy]
"""

from collections.abc import Sequence

from tyro.conf import Positional

from tfm_jax.arrays import DTYPES, Dtype
from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, section
from tfm_jax.lora.files import Dialect
from tfm_jax.train.export import export


@section
class Options:
    run_folder: Positional[NonEmptyPath]
    """Folder of the run, its train.output."""
    file: Positional[NonEmptyPath]
    """New safetensors file to write."""
    dialect: Dialect = "comfy"
    """Names of the tensors. comfy: loaded by diffusers, ComfyUI and DiffSynth. diffsynth: as in the official TFM
    release. diffusers: the names of diffusers. kohya: for musubi-tuner and other programs that use kohya's names."""
    dtype: Dtype = "bfloat16"
    """Type of the factors."""
    step: int | None = None
    """Checkpoint to export; null exports the newest undamaged one."""


def execute(argv: Sequence[str]) -> None:
    options = command.parse(Options, argv, "tfm-export", __doc__).options()
    step, count = export(options.run_folder, options.file, options.dialect, DTYPES[options.dtype], options.step)
    print(f"{options.file}: {count} adapters after step {step} ({options.dialect}, {options.dtype})")


def main() -> None:
    command.run(execute)
