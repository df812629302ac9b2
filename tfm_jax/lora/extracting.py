"""The LoRA that comes closest to the difference between two models."""

import numpy as np
from einops import rearrange
from tqdm import tqdm

from tfm_jax.errors import InputError
from tfm_jax.lora.files import Adapter, Lora, uniform
from tfm_jax.lora.keys import network_order
from tfm_jax.wan.checks import check_source
from tfm_jax.wan.components import TRANSFORMER, abstract_parameters
from tfm_jax.wan.names import (
    BLOCK_LINEARS,
    OUTER_LINEARS,
    BlockLinear,
    OuterLinear,
    Row,
    TransformerLinear,
    transformer_rows,
)
from tfm_jax.wan.sources import Source

EXTRA_COLUMNS, ROUNDS = 16, 4
"""Columns beyond the rank, and rounds, of the iteration that finds the largest singular vectors."""


def extract(base: Source, tuned: Source, rank: int) -> tuple[Lora, dict[TransformerLinear, float]]:
    """Return the LoRA of this rank that comes closest to `tuned` less `base`.

    Linear layers that differ get adapters: the largest singular vectors of the difference of their weights. What
    differs in other tensors becomes a difference of the LoRA. Only one tensor of each model is in memory at a time.

    Returns:
        The LoRA, and the share of the squared norm of each difference that its adapter contains.

    Raises:
        InputError: the models have different sizes or are equal, or a model is damaged.
    """
    _check_same_sizes(base, tuned)
    config = base.config
    rows = transformer_rows(config.layers)
    linears = _linears(config.layers)
    adapters: dict[TransformerLinear, Adapter] = {}
    differences: dict[str, np.ndarray] = {}
    shares: dict[TransformerLinear, float] = {}
    rng = np.random.default_rng(0)
    for row in tqdm(rows, desc="comparing", unit="tensor"):
        difference = _difference(base, tuned, row)
        if not difference.any():
            continue
        if linear := linears.get(row.original):
            adapters[linear], shares[linear] = factorise(difference.T, rank, rng)
        else:
            pattern = f"{' '.join(row.our_axes)} -> {' '.join(row.torch_axes)}"
            differences[row.original] = rearrange(difference, pattern)
    if not adapters:
        raise InputError(f"{tuned.file}: no linear layer differs from {base.file}; expected a fine-tuned model")
    adapters = _in_all_blocks(adapters, config.layers)
    alphas = {linear: float(len(adapter.a)) for linear, adapter in adapters.items()}
    return uniform(adapters, alphas)._replace(differences=differences), shares


def factorise(matrix: np.ndarray, rank: int, rng: np.random.Generator) -> tuple[Adapter, float]:
    """Return factors with B A close to `matrix`, and the share of its squared norm that B A contains.

    The factors come from the `rank` largest singular values, each of which is split evenly between A and B. Subspace
    iteration finds them (Halko, Martinsson and Tropp 2011, algorithm 4.4), since a whole decomposition takes minutes.
    """
    rank = min(rank, *matrix.shape)
    columns = min(rank + EXTRA_COLUMNS, *matrix.shape)
    basis, _ = np.linalg.qr(matrix @ rng.standard_normal((matrix.shape[1], columns), np.float32))
    for _ in range(ROUNDS):
        other, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ other)
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    share = float(np.sum(values[:rank].astype(np.float64) ** 2) / np.sum(np.square(matrix, dtype=np.float64)))
    return Adapter(root[:, None] * right[:rank], basis @ left[:, :rank] * root), share


def _check_same_sizes(base: Source, tuned: Source) -> None:
    if base.config != tuned.config:
        raise InputError(f"{tuned.file}: the sizes are {tuned.config}; expected {base.config}, as in {base.file}")
    parameters = abstract_parameters(TRANSFORMER, base.config, np.float32)
    for source in (base, tuned):
        check_source(source, parameters)


def _linears(layers: int) -> dict[str, TransformerLinear]:
    """Map the original names of the weights of linear layers to the layers."""
    linears: list[TransformerLinear] = [OuterLinear(name) for name in OUTER_LINEARS]
    linears += [BlockLinear(layer, name) for layer in range(layers) for name in BLOCK_LINEARS]
    return {f"{linear}.weight": linear for linear in linears}


def _difference(base: Source, tuned: Source, row: Row) -> np.ndarray:
    difference = tuned.read(row).astype(np.float32) - base.read(row)
    if not np.isfinite(difference).all():
        raise InputError((base if not np.isfinite(base.read(row)).all() else tuned).not_finite(row))
    return difference


def _in_all_blocks(adapters: dict[TransformerLinear, Adapter], layers: int) -> dict[TransformerLinear, Adapter]:
    """Add adapters that are zero, so that a linear layer with an adapter has one in every block."""
    found = dict(adapters)
    for linear, (a, b) in adapters.items():
        if isinstance(linear, BlockLinear):
            for layer in range(layers):
                found.setdefault(BlockLinear(layer, linear.name), Adapter(np.zeros_like(a), np.zeros_like(b)))
    return {linear: found[linear] for linear in sorted(found, key=network_order)}
