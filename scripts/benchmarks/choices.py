"""Some of our own choices beside what they replaced, so that it shows when a new version of JAX makes one of them
pointless."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from benchmarks import ours
from benchmarks.sizes import Sizes
from benchmarks.timing import Program, Row, race
from tfm_jax.wan import remat
from tfm_jax.wan.layers import matmul

SUBJECT = "choices"


def measure(sizes: Sizes) -> Iterator[Row]:
    work = sizes.growth
    for name, width_in, width_out in (
        ("A", work.config.ffn_dim, work.rank),
        ("B", work.rank, work.config.ffn_dim),
    ):
        case = f"gradient of LoRA's {name}, {work.tokens:,} tokens, {width_in} to {width_out} channels"
        x, kernel, gradient = (
            jnp.ones(shape, sizes.dtype)
            for shape in ((1, work.tokens, width_in), (width_in, width_out), (1, work.tokens, width_out))
        )
        run, peer = (_kernel_gradient(product, x, kernel, gradient) for product in (matmul, _plain_matmul))
        yield race(SUBJECT, case, run, "JAX's own gradient", peer, sizes.budget)
    split, batch = ours.adapted(work, sizes), ours.batch(work, sizes)
    with _everything_saved():
        peer = ours.training(split, batch, "none")
    run = ours.training(split, batch, "none")
    yield race(SUBJECT, f"a step, remat=none, {work}", run, "everything saved", peer, sizes.budget)


def _plain_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


def _kernel_gradient(product, x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Program:
    run = jax.jit(lambda x, kernel, gradient: jax.vjp(product, x, kernel)[1](gradient)[1])
    return lambda: jax.block_until_ready(run(x, kernel, gradient))


@contextmanager
def _everything_saved() -> Iterator[None]:
    """Compile `remat=none` with a policy that saves the results of elementwise operations, too."""
    before = remat.POLICIES["none"]
    remat.POLICIES["none"] = jax.checkpoint_policies.everything_saveable
    jax.clear_caches()  # which know nothing of the policy
    yield
    remat.POLICIES["none"] = before
    jax.clear_caches()
