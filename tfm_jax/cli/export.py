"""Write the LoRA of a training run to a safetensors file.

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
    """Folder of the run, which was its train.output."""
    file: Positional[NonEmptyPath]
    """Safetensors file to write; it must not exist."""
    dialect: Dialect = "comfy"
    """Selects the names of the tensors. comfy: diffusers, ComfyUI and DiffSynth can load the file. diffsynth: the names
    in the official TFM release. diffusers: the names in diffusers, and the only choice for a DoRA. kohya: the names in
    musubi-tuner and other programs that follow kohya."""
    dtype: Dtype = "bfloat16"
    """Data type of the factors."""
    step: int | None = None
    """Step of the checkpoint to export; null exports the newest checkpoint that is not damaged."""
    ema: bool = False
    """Export the moving average of the adapters, for runs with train.ema_decay."""


def execute(argv: Sequence[str]) -> None:
    options = command.parse(Options, argv, "tfm-export", __doc__).options()
    dtype = DTYPES[options.dtype]
    step, count = export(options.run_folder, options.file, options.dialect, dtype, options.step, options.ema)
    average = ", moving average" if options.ema else ""
    print(f"{options.file}: {count} adapters after step {step} ({options.dialect}, {options.dtype}{average})")


def main() -> None:
    command.run(execute)
