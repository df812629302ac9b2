"""LoRA files with random factors, and the weight changes that they describe."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tfm_jax.lora.applying import transformer_shapes
from tfm_jax.lora.files import Adapter, Lora, write_lora
from tfm_jax.wan.names import BLOCK_LINEARS, BlockLinear, OuterLinear
from tfm_jax.wan.transformer import TransformerConfig

LAYERS, DIM, FFN_DIM, RANK = 2, 24, 40, 4


def make_lora(alpha: float = RANK, layers: int = LAYERS, targets=tuple(BLOCK_LINEARS), ffn_dim: int = FFN_DIM) -> Lora:
    rng = np.random.default_rng(layers)
    adapters = {}
    for layer in range(layers):
        for name in targets:
            features_in = ffn_dim if name == "ffn.2" else DIM
            features_out = ffn_dim if name == "ffn.0" else DIM
            # Transposed and not contiguous, like factors from JAX's [in, rank] and [rank, out].
            a = rng.normal(0, 0.1, size=(features_in, RANK)).astype(np.float32).T
            b = rng.normal(0, 0.1, size=(RANK, features_out)).astype(np.float32).T
            adapters[BlockLinear(layer, name)] = Adapter(a, b)
    return Lora(adapters, RANK, alpha)


def random_lora(config: TransformerConfig, rank: int = RANK, alpha: float = RANK, outer=(), seed: int = 0) -> Lora:
    """Return a LoRA for a transformer of these sizes, on all linear layers of the blocks and on those in `outer`."""
    rng, shapes = np.random.default_rng(seed), transformer_shapes(config)
    linears = [OuterLinear(name) for name in outer]
    linears += [BlockLinear(layer, name) for layer in range(config.layers) for name in BLOCK_LINEARS]
    adapters = {}
    for linear in linears:
        features_out, features_in = shapes[f"{linear}.weight"]
        a = rng.normal(0, features_in**-0.5, (rank, features_in)).astype(np.float32)
        adapters[linear] = Adapter(a, rng.normal(0, 0.2, (features_out, rank)).astype(np.float32))
    return Lora(adapters, rank, alpha)


def random_differences(config: TransformerConfig, names: Iterable[str], seed: int = 0) -> dict[str, np.ndarray]:
    rng, shapes = np.random.default_rng(seed), transformer_shapes(config)
    return {name: rng.normal(0, 0.1, shapes[name]).astype(np.float32) for name in names}


def official_file(path: Path, layers: int = 40, dim: int = 8, ffn_dim: int = 12, rank: int = 32) -> Path:
    """Write a file with the keys and dtypes of the TFM release's LoRA for 14B and, by default, small shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for name in BLOCK_LINEARS:
            features_in, features_out = (ffn_dim if name == end else dim for end in ("ffn.2", "ffn.0"))
            module = f"blocks.{layer}.{name}"
            a = torch.randn(rank, features_in, generator=generator) / features_in**0.5
            b = torch.randn(features_out, rank, generator=generator) * 0.1
            tensors[f"{module}.lora_A.default.weight"] = a.bfloat16()
            tensors[f"{module}.lora_B.default.weight"] = b.bfloat16()
    save_file(tensors, path)
    return path


def official_zeros(path: Path) -> Path:
    """Write a file with the keys, shapes and dtypes of the TFM release's LoRA. Its zeros take no space on the disk."""
    header, end = {}, 0
    for layer in range(40):
        for name in BLOCK_LINEARS:
            features_in, features_out = (13824 if name == wide else 5120 for wide in ("ffn.2", "ffn.0"))
            for factor, shape in (("A", (32, features_in)), ("B", (features_out, 32))):
                start, end = end, end + 2 * math.prod(shape)
                about = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
                header[f"blocks.{layer}.{name}.lora_{factor}.default.weight"] = about
    text = json.dumps(header).encode()
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


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
