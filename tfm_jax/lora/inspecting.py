"""What a LoRA file contains, and how large its changes are in each linear layer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tfm_jax.files import replacing
from tfm_jax.lora.files import Adapter, Lora, read_lora
from tfm_jax.lora.keys import DIALECT_KEYS, LOADED_BY, Dialect, parse_difference, parse_factor
from tfm_jax.wan.names import BLOCK_LINEARS, BlockLinear, OuterLinear, TransformerLinear
from tfm_jax.wan.tensors import open_safetensors, safetensors_dtypes

BARS = "▁▂▃▄▅▆▇█"
MISSING = "·"
"""Stands in a chart for a linear layer without an adapter."""


class Contents(NamedTuple):
    """A LoRA and the properties of its file."""

    lora: Lora
    dialect: Dialect | None
    """None if the keys are those of none of our dialects."""
    dtypes: tuple[np.dtype, ...]
    """Dtypes of the factors and differences."""
    ranks: tuple[int, ...]
    """Ranks of the adapters in the file, in ascending order."""
    alphas: tuple[float, ...]
    """Values of the `.alpha` tensors, in ascending order."""
    example: str
    """A key of the file."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype that holds every value of the file."""
        return self.dtypes[0] if len(self.dtypes) == 1 else np.dtype(np.float32)


def read_contents(path: Path) -> Contents:
    """Read a LoRA file and its properties.

    Raises:
        InputError: see `read_lora`.
    """
    lora, tensors = read_lora(path), open_safetensors(path)
    keys = [key for key in tensors if not parse_difference(key)]
    parts = {key: found[1] for key in keys if (found := parse_factor(key))}
    ranks = {tensors[key].shape[0] for key, part in parts.items() if part == "A"}
    alphas = {float(tensors[key].read(...).item()) for key, part in parts.items() if part == "alpha"}
    always_float32 = [key for key, part in parts.items() if part in ("alpha", "magnitude")]
    dtypes = {dtype for key, dtype in safetensors_dtypes(path).items() if key not in always_float32}
    dialect, types = find_dialect(keys), tuple(sorted(dtypes, key=str))
    return Contents(lora, dialect, types, tuple(sorted(ranks)), tuple(sorted(alphas)), keys[0])


def find_dialect(keys: Iterable[str]) -> Dialect | None:
    """Return the dialect in which these keys of factors are written, or None if it is none of ours."""
    parsed = {key: found for key in keys if (found := parse_factor(key))}
    for dialect, names in DIALECT_KEYS.items():
        alpha = any(part == "alpha" for _, part in parsed.values())
        if alpha == (dialect == "kohya") and all(names.key(*found) == key for key, found in parsed.items()):
            return dialect
    return None


def product(one: Adapter, other: Adapter) -> float:
    """Return the inner product of the matrices B A of two adapters, from the small products of their factors."""
    return float(np.sum((one.b.T @ other.b).astype(np.float64) * (one.a @ other.a.T)))


def norms(lora: Lora) -> dict[TransformerLinear, float]:
    """Return the Frobenius norm of what the adapters add to every linear layer: of alpha / rank * B A."""
    return {linear: lora.scale * product(a, a) ** 0.5 for linear, a in lora.adapters.items()}


def describe(path: Path, contents: Contents, layers: int | None = None) -> str:
    """Return a description of a LoRA file, with a chart of the norms.

    Args:
        layers: number of blocks of the model; None takes it from the file.
    """
    lora, dialect = contents.lora, contents.dialect
    blocks = [linear for linear in lora.adapters if isinstance(linear, BlockLinear)]
    layers = layers or max((linear.layer + 1 for linear in blocks), default=0)
    outer = [str(linear) for linear in lora.adapters if isinstance(linear, OuterLinear)]
    spelling = f"dialect {dialect} (for {LOADED_BY[dialect]})" if dialect else "in no dialect that we write"
    equal = "equal to the rank" if len(contents.ranks) > 1 else f"{lora.alpha:g}"
    size = f"rank {_span(contents.ranks)}, alpha {_span(contents.alphas) if contents.alphas else equal}"
    lines = [
        f"{path}: {spelling}, {', '.join(map(str, contents.dtypes))}, {size}",
        f"keys such as {contents.example}",
        f"adapters on {len(blocks)} of the {len(BLOCK_LINEARS) * layers} linear layers in {layers} blocks: "
        + ", ".join(dict.fromkeys(linear.name for linear in blocks)),
    ]
    if outer:
        lines.append(f"adapters outside the blocks: {', '.join(outer)}")
    if lora.magnitudes:
        lines.append("a DoRA: each row of a changed weight also gets a new norm, which the chart does not show")
    if lora.differences:
        example = next(iter(lora.differences))
        lines.append(
            f"differences of {len(lora.differences)} whole tensors, such as {example}; besides this package, "
            "only ComfyUI applies all of them"
        )
    lines += [f"{name}: {value}" for name, value in lora.metadata.items()]
    return "\n".join(
        [*lines, "", "norm of the change of each linear layer, from the first block to the last", *chart(norms(lora))]
    )


def _span(values: Sequence[int | float]) -> str:
    """Format the range of sorted values."""
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def chart(values: Mapping[TransformerLinear, float]) -> list[str]:
    """Draw a line of bars for every kind of linear layer, with a bar for each block. All lines have the same scale."""
    top = max(values.values()) or 1.0
    layers = range(1 + max((linear.layer for linear in values if isinstance(linear, BlockLinear)), default=-1))
    lines = []
    for name in dict.fromkeys(linear.name for linear in values):
        row = {linear: value for linear, value in values.items() if linear.name == name}
        shown = [BlockLinear(layer, name) for layer in layers] if name in BLOCK_LINEARS else [OuterLinear(name)]
        bars = "".join(_bar(row[linear] / top) if linear in row else MISSING for linear in shown)
        lines.append(f"{name:17}  {bars:{max(len(layers), 1)}}  {min(row.values()):.3g} to {max(row.values()):.3g}")
    return lines


def _bar(share: float) -> str:
    return BARS[min(int(share * len(BARS)), len(BARS) - 1)]


def draw(values: Mapping[TransformerLinear, float], file: Path) -> None:
    """Plot the values of the linear layers in the blocks against the number of the block, as a PNG file."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for name in BLOCK_LINEARS:
        row = [
            (linear.layer, value)
            for linear, value in values.items()
            if linear.name == name and isinstance(linear, BlockLinear)
        ]
        if row:
            axis.plot(*zip(*row, strict=True), ".-", label=name)
    axis.set_xlabel("block")
    axis.set_ylabel("norm of the change")
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8)
    with replacing(file) as scratch:
        figure.savefig(scratch, format="png", dpi=100)
    plt.close(figure)
