"""The rate of one large matrix product in JAX and in PyTorch: what this device gives to both."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.sizes import Sizes
from benchmarks.timing import Row, race

SIZE = {"cpu": 2048, "gpu": 8192}


def measure(sizes: Sizes) -> Iterator[Row]:
    n = SIZE[sizes.device]
    array = np.random.default_rng(0).standard_normal((n, n), np.float32)
    ours, theirs = jnp.asarray(array, sizes.dtype), peers.tensor(array, sizes)
    product = jax.jit(jnp.matmul)
    row = race(
        "matmul",
        f"{n} x {n} x {n}, {sizes.dtype}",
        lambda: jax.block_until_ready(product(ours, ours)),
        "PyTorch",
        peers.program(sizes, lambda: theirs @ theirs),
        sizes.budget,
    )
    rates = [2e-12 * n**3 / seconds for seconds in (row.seconds, row.peer_seconds)]
    yield row._replace(note=f"{rates[0]:.3g} and {rates[1]:.3g} TFLOP/s")
