"""Our attention, forward and with gradients, beside PyTorch's, JAX's, and chunks that JAX differentiates."""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange

from benchmarks import peers
from benchmarks.sizes import Sizes
from benchmarks.timing import Program, Row, pair, take_turns
from tfm_jax.wan.attention import attention


def measure(sizes: Sizes) -> Iterator[Row]:
    for batch, queries, keys, heads, width in sizes.attention:
        rng = np.random.default_rng(0)
        lengths = (queries, keys, keys, queries)
        arrays = [rng.standard_normal((batch, n, heads, width), np.float32) for n in lengths]
        for passes, backward in (("forward", False), ("forward and backward", True)):
            others = {
                "PyTorch": _in_torch(arrays, backward, sizes),
                "chunks, differentiated by JAX": _in_jax(_mapped_attention, arrays, backward, sizes),
            }
            if sizes.device == "cpu":  # on a GPU, the scores of a whole clip do not fit
                others["jax.nn.dot_product_attention"] = _in_jax(jax.nn.dot_product_attention, arrays, backward, sizes)
            times = take_turns({"": _in_jax(attention, arrays, backward, sizes), **others}, sizes.budget)
            case = f"{passes}, [{batch}, {queries}, {heads}, {width}] x {keys} keys"
            yield from pair("attention", case, times, [""], list(others))


def _in_jax(function: Callable, arrays: Sequence[np.ndarray], backward: bool, sizes: Sizes) -> Program:
    def with_gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        out, pullback = jax.vjp(function, *arrays[:3])
        return out, *pullback(arrays[3])

    run = jax.jit(with_gradients if backward else lambda *arrays: function(*arrays[:3]))
    inputs = [jnp.asarray(x, sizes.dtype) for x in arrays]
    return lambda: jax.block_until_ready(run(*inputs))


def _in_torch(arrays: Sequence[np.ndarray], backward: bool, sizes: Sizes) -> Program:
    """PyTorch's kernels expect heads before tokens, so transpose the inputs here, before the timing starts."""
    tensors = [peers.tensor(x, sizes).transpose(1, 2).contiguous() for x in arrays]
    query, key, value = (x.requires_grad_(backward) for x in tensors[:3])

    def run() -> object:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return torch.autograd.grad(out, (query, key, value), tensors[3]) if backward else out

    return peers.program(sizes, run)


def _mapped_attention(query: jax.Array, key: jax.Array, value: jax.Array, size: int = 512) -> jax.Array:
    """Compute exact attention in linear memory the simplest way: chunks of queries, recomputed in the backward pass."""
    length = query.shape[1]
    chunks = -(-length // size)
    padded = jnp.pad(query, ((0, 0), (0, -length % chunks), (0, 0), (0, 0)))
    split = rearrange(padded, "b (i q) n k -> i b q n k", i=chunks)
    out = jax.lax.map(jax.checkpoint(lambda chunk: jax.nn.dot_product_attention(chunk, key, value)), split)
    return rearrange(out, "i b q n k -> b (i q) n k")[:, :length]
