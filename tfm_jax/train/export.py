"""Export a checkpoint of a training run as a LoRA file for inference."""

from importlib.metadata import version
from pathlib import Path

import numpy as np

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.errors import InputError
from tfm_jax.files import check_new_file
from tfm_jax.lora.adapters import lora_from_checkpoint
from tfm_jax.lora.files import Dialect, write_lora


def export(run: Path, file: Path, dialect: Dialect, dtype: np.dtype, step: int | None = None) -> tuple[int, int]:
    """Write the LoRA of the training run in the folder `run` to `file`, with metadata that says how it was trained.

    The LoRA comes from the newest undamaged checkpoint, or from that of `step`. The run may still be training.

    Returns:
        The step of the checkpoint, and the number of linear layers with an adapter.

    Raises:
        InputError: there is no such undamaged checkpoint, or `file` already exists or cannot be created.
    """
    check_new_file(file)
    if not (run / "checkpoints").is_dir():
        raise InputError(f"{run}: contains no checkpoints/; expected the train.output of a training run")
    with Checkpoints(run / "checkpoints") as checkpoints:
        restored = checkpoints.restore(step=step)
    if restored is None:
        raise InputError(f"{run}: contains no usable checkpoint; expected at least one")
    config = restored.metadata["config"]
    factors = {n.removeprefix("lora/"): np.asarray(a) for n, a in restored.arrays.items() if n.startswith("lora/")}
    lora = lora_from_checkpoint(factors, config["lora"]["alpha"])
    metadata = {
        "base_model": config["model"]["path"],
        "rank": config["lora"]["rank"],
        "alpha": config["lora"]["alpha"],
        "steps": restored.step,
        "objective": config["objective"]["kind"],
        "rho": config["objective"]["rho"],
        "beta": config["objective"]["beta"],
        "tfm_jax": version("tfm_jax"),
    }
    write_lora(file, lora, dialect, dtype, {name: str(value) for name, value in metadata.items()})
    return restored.step, len(lora.adapters)
