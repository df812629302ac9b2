"""Fingerprints see every change of an array, and are the same on every mesh."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import virtual_devices
from helpers.paths import ROOT

from tfm_jax.checkpoint import fingerprints


def fingerprint(array: np.ndarray) -> int:
    return fingerprints({"x": jnp.asarray(array)})["x"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8])
def test_fingerprints_see_every_change(dtype):
    rng = np.random.default_rng(0)
    x = np.asarray(1000 * rng.standard_normal((8, 8, 8))).astype(dtype)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    seen = {fingerprint(x)}

    def changed(value: np.ndarray) -> None:
        """Check that this value has a new fingerprint."""
        before = len(seen)
        seen.add(fingerprint(value))
        assert len(seen) == before + 1

    def flipped(mask: int, *places: tuple[int, ...]) -> np.ndarray:
        copy = x.copy()
        for place in places:
            copy.view(unsigned)[place] ^= unsigned(mask)
        return copy

    sign = 1 << (8 * x.dtype.itemsize - 1)
    for bit in range(8 * x.dtype.itemsize):
        changed(flipped(1 << bit, (1, 2, 3)))
    changed(flipped(1, (0, 0, 0)))
    for other in range(1, 8):
        changed(flipped(sign, (0, 0, 0), (0, 0, other)))
        changed(flipped(sign, (0, 0, 0), (other, 0, 0)))
    changed((x.view(unsigned) ^ unsigned(sign)).view(x.dtype))  # the whole array negated
    for axes in ((0, 1), (1, 2), (0, 2)):
        changed(np.swapaxes(x, *axes))
    for axis in range(3):
        changed(np.flip(x, axis))
        changed(np.roll(x, 1, axis))
    swapped = x.copy()
    swapped[0, 0, 0], swapped[7, 7, 7] = x[7, 7, 7], x[0, 0, 0]
    changed(swapped)
    zeroed = x.copy()
    zeroed[2:4, :, 1:5] = 0
    changed(zeroed)
    changed(np.zeros_like(x))
    changed(np.zeros((8, 8, 7), dtype))


def test_fingerprints_are_the_same_on_every_mesh():
    program = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from tfm_jax.checkpoint import fingerprints
mesh = jax.make_mesh((2, 4), ("a", "b"))
specs = (None, "a"), ("b", None, "a"), (("a", "b"),), (None, None, "b"), ()
for dtype in ("float32", "bfloat16"):
    x = jax.random.normal(jax.random.key(0), (8, 6, 16)).astype(dtype)
    split = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for spec in specs]
    assert split[1].addressable_shards[0].data.shape == (2, 6, 8)
    print(json.dumps(list(fingerprints(dict(enumerate(split))).values())))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=virtual_devices.environment(8) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    x = jax.random.normal(jax.random.key(0), (8, 6, 16))
    ours = [[fingerprint(x.astype(dtype))] * 5 for dtype in ("float32", "bfloat16")]
    assert [json.loads(line) for line in done.stdout.splitlines()] == ours
