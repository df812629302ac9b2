"""Open the safetensors files of a network: shards, the prefixes that some programs add, and 8-bit floats with scales.

ComfyUI's fp8 files have a marker, and for the weight of every linear layer a number with which it is multiplied:

    scaled_fp8                            [0]           F8_E4M3
    blocks.0.self_attn.q.weight           [5120, 5120]  F8_E4M3
    blocks.0.self_attn.q.scale_weight     []            F32
    blocks.0.self_attn.q.scale_input      []            F32      only for multiplying in 8 bits

Without marker and scales, the 8-bit numbers are the weights themselves. ComfyUI's file of the text encoder also has
its tokenizer.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from tfm_jax.errors import InputError
from tfm_jax.inputs import short_repr
from tfm_jax.wan.tensors import DTYPES, FP8, Index, LazyTensor, Tensors, open_safetensors

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
"""What some programs write before the name of every tensor."""

SPIECE_MODEL = "spiece_model"
"""Name of the SentencePiece model of the tokenizer, as bytes. We read the tokenizer from its own folder."""

_MARKER, _SCALE, _SCALE_OF_INPUT = "scaled_fp8", "scale_weight", "scale_input"


def open_tensors(files: Sequence[Path]) -> Tensors:
    """Map names to the tensors in safetensors files: names without prefix, and 8-bit tensors with their scales applied.

    Raises:
        InputError: `open_safetensors` rejects a file, a tensor is in two files, or a scale is missing or not a number.
    """
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        for name, tensor in open_safetensors(file, {**DTYPES, **FP8}, skipped=(SPIECE_MODEL,)).items():
            if name in tensors:
                raise InputError(f"{file}: tensor {short_repr(name)} is also in {tensors[name].file}; expected it once")
            tensors[name] = tensor
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            break
    return _with_scales(tensors)


def _with_scales(tensors: dict[str, LazyTensor]) -> Tensors:
    """Remove marker and scales, and let every tensor of 8 bits be read as wider numbers."""
    marked = tensors.pop(_MARKER, None) is not None
    scales: dict[str, float] = {}
    for name in list(tensors):
        module, _, part = name.rpartition(".")
        weight = f"{module}.weight"
        if weight not in tensors:
            continue
        if part == _SCALE:
            scales[weight] = _scale(name, tensors.pop(name))
        elif part == _SCALE_OF_INPUT:
            del tensors[name]
    for name, tensor in tensors.items():
        if name in scales:
            tensors[name] = _widened(tensor, scales[name])
        elif tensor.fp8 and (marked or scales):
            raise InputError(
                f"{tensor.file}: {name} has 8 bits but no scale; expected {name.removesuffix('weight')}{_SCALE}, "
                "because the file has scales"
            )
        elif tensor.fp8:
            tensors[name] = _widened(tensor)
    return tensors


def _scale(name: str, tensor: LazyTensor) -> float:
    if math.prod(tensor.shape) != 1:
        raise InputError(f"{tensor.file}: {name} has shape {list(tensor.shape)}; expected one number for the tensor")
    value = float(tensor.read(...).item())
    if not 0 < value < math.inf:
        raise InputError(f"{tensor.file}: {name} is {value:g}; expected a positive number")
    return value


def _widened(tensor: LazyTensor, scale: float | None = None) -> LazyTensor:
    """Return a tensor that is read in float32 and multiplied by `scale`; or as it is, in bfloat16, which is exact."""

    def read(index: Index) -> np.ndarray:
        values = tensor.read(index)
        return values.astype(ml_dtypes.bfloat16) if scale is None else values.astype(np.float32) * np.float32(scale)

    return tensor._replace(read=read, fp8=False)
