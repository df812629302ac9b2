"""LoRA files with random factors, and the weight changes that they describe."""

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tfm_jax.lora.files import Adapter, Lora, write_lora
from tfm_jax.wan.names import BLOCK_LINEARS, BlockLinear

LAYERS, DIM, FFN_DIM, RANK = 2, 24, 40, 4


def make_lora(alpha: float = RANK, layers: int = LAYERS, targets=tuple(BLOCK_LINEARS)) -> Lora:
    rng = np.random.default_rng(layers)
    adapters = {}
    for layer in range(layers):
        for name in targets:
            features_in = FFN_DIM if name == "ffn.2" else DIM
            features_out = FFN_DIM if name == "ffn.0" else DIM
            # Transposed and not contiguous, like factors from JAX's [in, rank] and [rank, out].
            a = rng.normal(0, 0.1, size=(features_in, RANK)).astype(np.float32).T
            b = rng.normal(0, 0.1, size=(RANK, features_out)).astype(np.float32).T
            adapters[BlockLinear(layer, name)] = Adapter(a, b)
    return Lora(adapters, RANK, alpha)


def deltas(lora: Lora) -> dict[BlockLinear, np.ndarray]:
    """Return the change of every weight, [out, in]."""
    return {name: lora.alpha / lora.rank * adapter.b @ adapter.a for name, adapter in lora.adapters.items()}


def assert_same_deltas(got: dict[BlockLinear, np.ndarray], want: dict[BlockLinear, np.ndarray]) -> None:
    assert list(got) == list(want)
    for linear, delta in want.items():
        np.testing.assert_allclose(got[linear], delta, rtol=0, atol=1e-6, err_msg=str(linear))


def file_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def rewritten(path: Path, change, dialect="comfy", alpha: float = RANK, metadata=None) -> Path:
    """Write a file in a dialect; `change(tensors)` edits its tensors or returns new ones."""
    write_lora(path, make_lora(alpha), dialect, np.float32)
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path, metadata)
    return path
