"""Export a checkpoint of a training run as a LoRA file for inference."""

from importlib.metadata import version
from pathlib import Path

import numpy as np

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.config import LoraConfig, from_plain
from tfm_jax.config.reading import shown
from tfm_jax.errors import InputError
from tfm_jax.files import check_new_file
from tfm_jax.lora.adapters import lora_from_checkpoint
from tfm_jax.lora.files import Dialect, write_lora


def export(
    run: Path, file: Path, dialect: Dialect, dtype: np.dtype, step: int | None = None, ema: bool = False
) -> tuple[int, int]:
    """Write the LoRA of the training run in the folder `run` to `file`, with metadata that says how it was trained.

    The LoRA comes from the newest undamaged checkpoint, or from that of `step`; with `ema`, it is the moving average of
    the adapters. The run may still be training.

    Returns:
        The step of the checkpoint, and the number of linear layers with an adapter.

    Raises:
        InputError: there is no such undamaged checkpoint, it has no moving average, or `file` already exists or cannot
            be created.
    """
    check_new_file(file)
    if not (run / "checkpoints").is_dir():
        raise InputError(f"{run}: contains no checkpoints/; expected the train.output of a training run")
    with Checkpoints(run / "checkpoints") as checkpoints:
        restored = checkpoints.restore(step=step)
    if restored is None:
        raise InputError(f"{run}: contains no usable checkpoint; expected at least one")
    config = restored.metadata["config"]
    settings = from_plain(LoraConfig, config["lora"], str(run / "checkpoints"))
    part = "ema/" if ema else "lora/"
    factors = {n.removeprefix(part): np.asarray(a) for n, a in restored.arrays.items() if n.startswith(part)}
    if not factors:
        raise InputError(
            f"{run}: was trained with train.ema_decay=null; expected a run with a moving average for --ema"
        )
    lora = lora_from_checkpoint(factors, settings)
    metadata = {
        "base_model": config["model"]["path"],
        "rank": settings.rank,
        "alpha": settings.alpha,
        **({"ranks": shown(settings.ranks)} if settings.ranks else {}),
        **({"rslora": True} if settings.rslora else {}),
        **({"dora": True} if settings.dora else {}),
        "steps": restored.step,
        "objective": config["objective"]["kind"],
        "rho": config["objective"]["rho"],
        "beta": config["objective"]["beta"],
        "tfm_jax": version("tfm_jax"),
        **({"ema_decay": config["train"]["ema_decay"]} if ema else {}),
    }
    write_lora(file, lora, dialect, dtype, {name: str(value) for name, value in metadata.items()})
    return restored.step, len(lora.adapters)
