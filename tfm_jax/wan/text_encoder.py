"""The text encoder of Wan: the encoder half of umT5 (transformers' `UMT5EncoderModel`, Wan's `wan/modules/t5.py`).

Unlike in T5, every layer has its own table of relative position biases. As in T5, attention scores are not divided by
the square root of the head width, linear layers have no bias, and the norms are RMS norms.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from tfm_jax.arrays import Text, TokenIds, TokenMask
from tfm_jax.errors import InputError
from tfm_jax.precision import precision_of
from tfm_jax.sharding import constrain
from tfm_jax.wan.layers import Linear, RMSNorm, param


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a umT5 encoder. The defaults are those of umT5-XXL, which all Wan2.1 models use."""

    vocab_size: int = 256384
    dim: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[Array, "q s"]:
    """Return the bucket, a row of the bias table, for every pair of a query and a source (T5's bidirectional rule).

    Half of the buckets are for sources after the query, the other half for all other sources. In each half, the first
    half of the buckets cover one distance each. The ranges of the others grow logarithmically up to `max_distance`,
    and the last bucket also covers all larger distances.
    """
    side = buckets // 2
    exact = side // 2
    offset = np.arange(1 - length, length)  # source minus query
    distance = np.abs(offset)
    # Computed in float32, as in transformers, because rounding decides on which side of an edge a distance falls.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    far = np.minimum(exact + steps.astype(np.int32), side - 1)
    row = np.where(distance < exact, distance, far) + side * (offset > 0)
    position = jnp.arange(length)
    return jnp.asarray(row, jnp.int32)[position[None, :] - position[:, None] + length - 1]


class Attention(nnx.Module):
    """Self-attention with a learnt bias per head and bucket of distances. The softmax runs in float32."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: DTypeLike):
        linear = functools.partial(Linear, rngs=rngs, bias=False, stack=stack, dtype=dtype)
        inner = config.heads * config.head_dim
        self.q = linear(config.dim, inner, axes=("embed", "heads"))
        self.k = linear(config.dim, inner, axes=("embed", "heads"))
        self.v = linear(config.dim, inner, axes=("embed", "heads"))
        self.o = linear(inner, config.dim, axes=("heads", "embed"))
        shape = (config.buckets, config.heads)
        self.position_bias = param(rngs.params(), shape, (None, None), stack=stack, dtype=dtype)
        self.heads = config.heads

    def __call__(self, x: Text, mask: TokenMask, buckets: Int[Array, "l l"]) -> Text:
        q, k, v = (rearrange(project(x), "b l (n k) -> b n l k", n=self.heads) for project in (self.q, self.k, self.v))
        bias = rearrange(self.position_bias[...][buckets], "q s n -> n q s")
        precision = precision_of(q, k, v)
        scores = jnp.einsum("bnqk,bnsk->bnqs", q, k, precision=precision, preferred_element_type=jnp.float32)
        scores = scores + bias.astype(jnp.float32)
        scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        out = jnp.einsum("bnqs,bnsk->bnqk", weights, v, precision=precision)
        return self.o(rearrange(out, "b n l k -> b l (n k)"))


class FeedForward(nnx.Module):
    """`down(gelu(gate(x)) * up(x))` with the tanh form of GELU."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: DTypeLike):
        linear = functools.partial(Linear, rngs=rngs, bias=False, stack=stack, dtype=dtype)
        self.gate = linear(config.dim, config.ffn_dim, axes=("embed", "mlp"))
        self.up = linear(config.dim, config.ffn_dim, axes=("embed", "mlp"))
        self.down = linear(config.ffn_dim, config.dim, axes=("mlp", "embed"))

    def __call__(self, x: Text) -> Text:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class Block(nnx.Module):
    """One encoder layer: attention, then a feed-forward network, each after a norm and with a residual connection."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: DTypeLike):
        self.norm1 = RMSNorm(config.dim, stack=stack, eps=config.eps)
        self.attention = Attention(config, rngs=rngs, stack=stack, dtype=dtype)
        self.norm2 = RMSNorm(config.dim, stack=stack, eps=config.eps)
        self.ffn = FeedForward(config, rngs=rngs, stack=stack, dtype=dtype)

    def __call__(self, x: Text, mask: TokenMask, buckets: Int[Array, "l l"]) -> Text:
        x = x + self.attention(self.norm1(x), mask, buckets)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
    """Maps `(ids, mask)` to embeddings: the `last_hidden_state` of transformers' `UMT5EncoderModel`.

    Weights and activations are in `dtype`, norms and softmax in float32.

    Raises:
        InputError: `dtype` is float16, in which the residual stream of umT5 overflows.
    """

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        if jnp.dtype(dtype) == jnp.float16:
            raise InputError("text encoder: dtype float16 overflows in umT5; use bfloat16 or float32")
        shape = (config.vocab_size, config.dim)
        self.embedding = param(rngs.params(), shape, ("vocab", "embed"), dtype=dtype, bound=math.sqrt(3))
        self.blocks = Block(config, rngs=rngs, stack=(config.layers,), dtype=dtype)
        self.norm = RMSNorm(config.dim, eps=config.eps)
        self.config = config

    @jax.jit
    def __call__(self, ids: TokenIds, mask: TokenMask) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the embeddings `[b l d]` of the tokens. `mask` is 1 on tokens and 0 on padding, which is ignored.

        Under `jax.set_mesh`, the prompts are split over the mesh.

        The rows of the padding are not zero. `encode_prompts` in `tfm_jax.wan.tokenizer` drops them, because the video
        transformer expects zeros there.
        """
        buckets = relative_buckets(ids.shape[1], self.config.buckets, self.config.max_distance)

        def layer(x: Text, block: Block) -> tuple[Text, None]:
            return constrain(block(x, mask, buckets), ("batch",)), None

        x, _ = jax.lax.scan(layer, constrain(self.embedding[...][ids], ("batch",)), self.blocks)
        return self.norm(x)
