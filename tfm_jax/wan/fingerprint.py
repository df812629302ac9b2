"""Identifies the weights of a network without reading all of them, to notice data that other weights have made."""

import dataclasses
import hashlib
import json
from pathlib import Path

import ml_dtypes
from einops import EinopsError
from safetensors import SafetensorError

from tfm_jax.errors import InputError
from tfm_jax.wan.components import Component
from tfm_jax.wan.sources import Source, find_source_or_none

SAMPLED = 16
"""Number of positions along each axis of a tensor, counted from the first, whose values are read."""


def fingerprint(model: Path, component: Component) -> str | None:
    """Return the fingerprint of a network in the directory of a model, or None if the directory does not contain it.

    Raises:
        InputError: `model` is not a directory, or the network is damaged or of an unsupported variant.
    """
    source = find_source_or_none(model, component)
    return fingerprint_source(source) if source else None


def fingerprint_source(source: Source) -> str:
    """Return 16 hexadecimal digits that identify a network: its sizes, its constants and its weights.

    Of every tensor, only the first values are read, and they are rounded to bfloat16. The layout of the directory and
    the data type of the files therefore do not matter. Training changes values everywhere in a network, which is
    noticed; a change of a few values may go unnoticed.

    Raises:
        InputError: a tensor is missing or misshapen.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(source.config)).encode())
    for row in source.component.rows(source.config):
        try:
            values = source.read(row, tuple(slice(min(length, SAMPLED)) for length in source.shape(row)))
        except (KeyError, IndexError, ValueError, SafetensorError, EinopsError):
            name = row.name(source.layout)
            raise InputError(f"{source.file}: tensor {name} is missing or misshapen; download it again") from None
        digest.update(json.dumps([row.ours, row.layer, values.shape]).encode())
        digest.update(values.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()[:16]
