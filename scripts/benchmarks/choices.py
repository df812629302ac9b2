"""Some of our own choices beside what they replaced, so that it shows when a new version of JAX makes one of them
pointless."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from benchmarks import ours
from benchmarks.sizes import Sizes
from benchmarks.timing import Program, Row, race
from tfm_jax.wan import remat
from tfm_jax.wan.attention import attention, chunked
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
    yield _heads_in_groups(sizes)
    split, batch = ours.adapted(work, sizes), ours.batch(work, sizes)
    with _everything_saved():
        peer = ours.training(split, batch, "none")
    run = ours.training(split, batch, "none")
    yield race(SUBJECT, f"a step, remat=none, {work}", run, "everything saved", peer, sizes.budget)


def _heads_in_groups(sizes: Sizes) -> Row:
    """Time attention in float32, for which GPUs and TPUs have no kernel of their own."""
    batch, queries, keys, heads, width = sizes.attention[0]
    lengths = (queries, keys, keys, queries)
    arrays = [jnp.ones((batch, length, heads, width), jnp.float32) for length in lengths]

    def compiled() -> Program:
        jax.clear_caches()  # which know nothing of the number of scores
        run = jax.jit(lambda *x: jax.vjp(attention, *x[:3])[1](x[3])).lower(*arrays).compile()
        return lambda: jax.block_until_ready(run(*arrays))

    run, before = compiled(), chunked.SCORES
    chunked.SCORES = batch * heads * queries * keys
    peer = compiled()
    chunked.SCORES = before
    case = f"attention and gradients, {list(arrays[0].shape)} x {keys} keys, a few heads at a time"
    return race(SUBJECT, case, run, "all heads at once", peer, sizes.budget)


def _plain_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


def _kernel_gradient(product: Callable, x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Program:
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
