"""A training run's newest checkpoint -> a LoRA file for inference."""

from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import to_files
from tfm_jax.lora.files import Dialect, write_lora


def export(run: Path, file: Path, dialect: Dialect, dtype: np.dtype, step: int | None = None) -> tuple[int, int]:
    """Write the LoRA of the run in `run` as `file`, with how it was made in the file's metadata.

    Returns:
        The step of the checkpoint and the number of adapted linear maps.

    Raises:
        InputError: the run has no (such) checkpoint, or the file is there already.
    """
    if file.exists():
        raise InputError(f"{file}: already there; expected a new file")
    if not (run / "checkpoints").is_dir():
        raise InputError(f"{run}: no checkpoints/ in it; expected the train.output of a training run")
    with Checkpoints(run / "checkpoints") as checkpoints:
        steps = checkpoints.steps
        if not steps:
            raise InputError(f"{run}: no complete checkpoint in it; expected one")
        if step is None:
            step = steps[-1]
        if step not in steps:
            raise InputError(f"{run}: no checkpoint of step {step}; expected one of {', '.join(map(str, steps))}")
        here = SingleDeviceSharding(jax.devices()[0])
        wanted = checkpoints.abstract(step)
        arrays = checkpoints.load(
            step, {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for n, a in wanted.items()}
        )
        config = checkpoints.facts(step)["config"]
    factors = {n.removeprefix("lora/"): np.asarray(a) for n, a in arrays.items() if n.startswith("lora/")}
    lora = to_files(factors, config["lora"]["alpha"])
    facts = {
        "base_model": config["model"]["path"],
        "rank": config["lora"]["rank"],
        "alpha": config["lora"]["alpha"],
        "steps": step,
        "objective": config["objective"]["kind"],
        "rho": config["objective"]["rho"],
        "beta": config["objective"]["beta"],
        "tfm_jax": version("tfm_jax"),
    }
    write_lora(file, lora, dialect, dtype, {name: str(value) for name, value in facts.items()})
    return step, len(lora.adapters)
