"""Several LoRAs at once, each with a strength: their sum is again a LoRA."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfm_jax.errors import InputError
from tfm_jax.lora.files import Adapter, Lora, read_lora, uniform
from tfm_jax.lora.keys import network_order
from tfm_jax.wan.names import TransformerLinear


class Choice(NamedTuple):
    """A LoRA file, and the strength by which its changes are multiplied."""

    file: Path
    strength: float


def parse_choice(text: str | Path) -> Choice:
    """Parse a LoRA file with or without a strength, such as `a.safetensors:0.7`.

    Raises:
        InputError: the strength is not finite.
    """
    file, _, end = str(text).rpartition(":")
    try:
        strength = float(end)
    except ValueError:
        return Choice(Path(text), 1.0)
    if not file:
        return Choice(Path(text), 1.0)
    if not math.isfinite(strength):
        raise InputError(f"{text}: the strength is {end}; expected a finite number")
    return Choice(Path(file), strength)


def read_loras(choices: Sequence[Choice]) -> Lora:
    """Read LoRA files and return their sum, weighted by the strengths.

    Raises:
        InputError: a file cannot be read (see `read_lora`), or cannot be added to the others (see `combine`).
    """
    return combine([(read_lora(choice.file), choice) for choice in choices])


def combine(loras: Sequence[tuple[Lora, Choice]]) -> Lora:
    """Return the weighted sum of LoRAs, whose ranks and linear layers may differ.

    The factors of a linear layer are concatenated along the rank. A single LoRA with strength 1 is returned as it is.

    Raises:
        InputError: two LoRAs are for models of different widths, or one of them is a DoRA.
    """
    first, choice = loras[0]
    if len(loras) == 1 and choice.strength == 1:
        return first
    parts: dict[TransformerLinear, list[Adapter]] = {}
    differences: dict[str, np.ndarray] = {}
    for lora, (file, strength) in loras:
        if lora.magnitudes:
            raise InputError(f"{file}: is a DoRA, which has no sum with others; expected it alone, with strength 1")
        for linear, (a, b) in lora.adapters.items():
            others = parts.setdefault(linear, [])
            if others and (a.shape[1], len(b)) != (others[0].a.shape[1], len(others[0].b)):
                raise InputError(f"{file}: the widths of {linear} differ from those in {choice.file}")
            others.append(Adapter(a, b * np.float32(strength * lora.scale)))
        for name, value in lora.differences.items():
            other = differences.get(name, np.zeros_like(value))
            if other.shape != value.shape:
                raise InputError(f"{file}: the shape of the difference for {name} differs from that in another file")
            differences[name] = other + np.float32(strength) * value
    adapters = {
        linear: Adapter(np.concatenate([p.a for p in parts[linear]]), np.concatenate([p.b for p in parts[linear]], 1))
        for linear in sorted(parts, key=network_order)
    }
    alphas = {linear: float(len(adapter.a)) for linear, adapter in adapters.items()}
    return uniform(adapters, alphas)._replace(differences=differences)
