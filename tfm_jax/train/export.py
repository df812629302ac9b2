"""A training run's newest checkpoint -> a LoRA file for inference."""

from importlib.metadata import version
from pathlib import Path

import numpy as np

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import lora_from_checkpoint
from tfm_jax.lora.files import Dialect, write_lora


def export(run: Path, file: Path, dialect: Dialect, dtype: np.dtype, step: int | None = None) -> tuple[int, int]:
    """Write the LoRA of the run in `run` as `file`, with how it was made in the file's metadata.

    Takes the newest checkpoint that is not damaged, or that of `step`. The run may still be training.

    Returns:
        The step of the checkpoint and the number of adapted linear layers.

    Raises:
        InputError: the run has no (such) checkpoint, that of `step` is damaged, or `file` is not a new file.
    """
    _check_new_file(file)
    if not (run / "checkpoints").is_dir():
        raise InputError(f"{run}: no checkpoints/ in it; expected the train.output of a training run")
    with Checkpoints(run / "checkpoints") as checkpoints:
        restored = checkpoints.restore(step=step)
    if restored is None:
        raise InputError(f"{run}: no usable checkpoint in it; expected at least one")
    config = restored.metadata["config"]
    factors = {n.removeprefix("lora/"): np.asarray(a) for n, a in restored.arrays.items() if n.startswith("lora/")}
    lora = lora_from_checkpoint(factors, config["lora"]["alpha"])
    facts = {
        "base_model": config["model"]["path"],
        "rank": config["lora"]["rank"],
        "alpha": config["lora"]["alpha"],
        "steps": restored.step,
        "objective": config["objective"]["kind"],
        "rho": config["objective"]["rho"],
        "beta": config["objective"]["beta"],
        "tfm_jax": version("tfm_jax"),
    }
    write_lora(file, lora, dialect, dtype, {name: str(value) for name, value in facts.items()})
    return restored.step, len(lora.adapters)


def _check_new_file(file: Path) -> None:
    """Raise InputError unless `file` is the name of a file that can be made."""
    if file.is_dir():
        raise InputError(f"{file}: a directory; expected the name of a new file")
    if file.exists():
        raise InputError(f"{file}: already there; expected a new file")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"{file}: {above} is a file; expected a directory")
