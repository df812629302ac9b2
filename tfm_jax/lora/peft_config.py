"""The `peft.LoraConfig` of a LoRA file: in the metadata of diffusers, or in the adapter_config.json of PEFT."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import pydantic

from tfm_jax.errors import InputError
from tfm_jax.inputs import parse_json, read_json, short_repr, validate

METADATA = "lora_adapter_metadata"
"""Name of the metadata that contain the configuration as JSON. Its fields have the prefix `transformer.` if a pipeline
of diffusers wrote them, and no prefix if a model did."""

_KEY_PREFIX = "base_model.model."


def to_metadata(rank: int, alpha: float, dora: bool, modules: list[str]) -> str:
    """Return the metadata from which `diffusers.loaders.WanLoraLoaderMixin` makes a `peft.LoraConfig`.

    Args:
        modules: diffusers' names of the linear layers with an adapter.
    """
    config = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "target_modules": modules}
    if dora:
        config["use_dora"] = True
    return json.dumps({f"transformer.{field}": value for field, value in config.items()})


def configured_alpha(
    path: Path, keys: Collection[str], metadata: Mapping[str, str], ranks: set[int], dora: bool
) -> float | None:
    """Return alpha from the configuration of a LoRA file; None if it has no configuration.

    Args:
        keys: those of the tensors in the file.
        ranks: those of the adapters in the file.
        dora: whether the file has the magnitudes of a DoRA.

    Raises:
        InputError: the configuration does not describe the tensors, or describes what this package does not know.
    """
    config_file = path.with_name("adapter_config.json")
    if METADATA in metadata:
        place = f"{path}: metadata {METADATA}"
        values = parse_json(metadata[METADATA], place)
    elif all(key.startswith(_KEY_PREFIX) for key in keys) and config_file.is_file():
        place, values = str(config_file), read_json(config_file)
    else:
        return None
    fields = {key.removeprefix("transformer."): value for key, value in values.items()}
    for field in ("rank_pattern", "alpha_pattern", "use_rslora"):
        if fields.get(field):
            raise InputError(f"{place}: {field} is {short_repr(fields[field])}; expected a plain LoRA without it")
    config = validate(_LoraConfig, fields, place)
    if ranks != {config.r}:
        expected = " and ".join(map(str, sorted(ranks)))
        raise InputError(f"{place}: r is {config.r}; expected {expected}, the rank of the tensors")
    if config.use_dora != dora:
        having = "has" if dora else "has no"
        raise InputError(
            f"{place}: use_dora is {short_repr(config.use_dora)}; expected {dora}, because the file {having} magnitudes"
        )
    return config.lora_alpha


class _LoraConfig(pydantic.BaseModel):
    """The fields of a `peft.LoraConfig` that say how the tensors are applied."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    r: int
    lora_alpha: Annotated[float, pydantic.Field(gt=0, lt=1e30)]
    use_dora: bool = False
