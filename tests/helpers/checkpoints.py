"""A small checkpointed state that differs at every step, and ways to damage its checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.checkpoint import Restored

FACTORS = "lora/blocks/self_attn/q"
METADATA = {
    "config": {
        "model": {"path": "model"},
        "lora": {"rank": 4, "alpha": 4.0},
        "objective": {"kind": "tfm", "rho": 10.0, "beta": 0.1},
    },
    "numbers": [0.1, 1e-300, 2**60, None, "Ω"],
}


def state(step: int) -> dict[str, jax.Array]:
    """Return the state of a run after `step` steps, with different values for every step."""
    key = jax.random.key(step)
    return {
        f"{FACTORS}/lora_a/value": jax.random.normal(key, (2, 160, 4)),
        f"{FACTORS}/lora_b/value": jax.random.normal(key, (2, 4, 160)),
        "moment": jnp.full(5, step, jnp.bfloat16),
        "step": jnp.int32(step),
    }


def make_target(metadata: dict) -> dict[str, jax.ShapeDtypeStruct]:
    assert metadata == METADATA
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in state(0).items()}


def assert_is_of_step(restored: Restored | None, step: int) -> None:
    assert restored is not None
    assert restored.step == step
    assert restored.metadata == METADATA
    expected = state(step)
    assert restored.arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert restored.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(restored.arrays[name], array)


def names(folder: Path) -> list[str]:
    """Return the names of all files in a folder."""
    return sorted(path.name for path in folder.iterdir())


def edit(file: Path, change: Callable[[dict], None]) -> None:
    """Apply `change` to the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def damage(folder: Path, step: int = 2) -> None:
    """Flip a bit in the array data of a checkpoint."""
    flip(max((folder / str(step)).rglob("d/*"), key=lambda file: file.stat().st_size), 0.5)


def flip(file: Path, place: float, bit: int = 0) -> None:
    """Flip one bit of the byte at the fraction `place` of a file."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)
