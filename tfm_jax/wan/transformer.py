"""The Wan2.1-T2V diffusion transformer (`wan/modules/model.py` of Wan-Video/Wan2.1).

A block is self-attention over the video's tokens with 3-D rotary positions, cross-attention to the text, and a
feed-forward network. The time embedding modulates the self-attention and the feed-forward network. All blocks have the
same shapes, so they are built as one stack and run by `jax.lax.scan`. `remat` selects which activations are saved for
the backward pass. Named scopes label the operations for profiles and for `tfm_jax.planning.roofline`.

On a mesh every activation `[b s d]` is sharded over batch and tokens, and every linear layer of a block over heads or
feed-forward channels. Within a block, apart from gathering weights, only attention (including the query and key norms)
and the sums in `o` and `down` communicate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tfm_jax.arrays import TEXT_LENGTH, Latents, PerVideo, Text
from tfm_jax.config import Remat
from tfm_jax.precision import precision_of
from tfm_jax.sharding import check_split, constrain
from tfm_jax.wan.attention import cross_attention, self_attention
from tfm_jax.wan.layers import LayerNorm, Linear, RMSNorm, constant, gathered, param
from tfm_jax.wan.remat import POLICIES
from tfm_jax.wan.rotary import Rotary, rotary_tables

PATCH = (1, 2, 2)

Tokens = Float[Array, "b s d"]
ACTIVATION = ("batch", "tokens", None)


@dataclass(frozen=True)
class TransformerConfig:
    """The architecture. Names follow Wan where possible. All Wan2.1-T2V models share the defaults."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    text_dim: int = 4096
    freq_dim: int = 256
    channels: int = 16
    eps: float = 1e-6
    text_len: int = TEXT_LENGTH
    """Number of text tokens to which prompts are padded or truncated."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def token_grid(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the number of tokens along time, height and width for latents of shape `[f h w c]`."""
    f, h, w = (length // step for length, step in zip(shape, PATCH, strict=False))
    return f, h, w


def sinusoidal_embedding(timestep: PerVideo, width: int) -> Float[Array, "b d"]:
    """Return `[cos, sin]` of the timestep (0..1000) at `width / 2` frequencies."""
    half = width // 2
    frequencies = jnp.asarray(10_000.0 ** -(np.arange(half, dtype=np.float64) / half), jnp.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Attention(nnx.Module):
    """Multi-head attention whose queries and keys pass through an RMS norm over all heads jointly."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: DTypeLike):
        self.heads = config.heads

        def linear(axes: tuple[str, str]) -> Linear:
            return Linear(config.dim, config.dim, rngs=rngs, axes=axes, stack=stack, dtype=dtype)

        self.q, self.k, self.v = (linear(("embed", "heads")) for _ in range(3))
        self.o = linear(("heads", "embed"))
        self.norm_q = RMSNorm(config.dim, stack=stack, eps=config.eps)
        self.norm_k = RMSNorm(config.dim, stack=stack, eps=config.eps)

    def __call__(self, x: Tokens, context: Float[Array, "b t d"], rotary: Rotary | None) -> Tokens:
        """Let `x` attend to `context`. In self-attention, `context` is `x`; in cross-attention, `rotary` is None."""
        query, key, value = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        query, key, value = (rearrange(y, "b s (n k) -> b s n k", n=self.heads) for y in (query, key, value))
        out = cross_attention(query, key, value) if rotary is None else self_attention(query, key, value, rotary)
        return self.o(rearrange(out, "b s n k -> b s (n k)"))


class FeedForward(nnx.Module):
    """`down(gelu(up(x)))` with the tanh form of GELU."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: DTypeLike):
        self.up = Linear(config.dim, config.ffn_dim, rngs=rngs, axes=("embed", "mlp"), stack=stack, dtype=dtype)
        self.down = Linear(config.ffn_dim, config.dim, rngs=rngs, axes=("mlp", "embed"), stack=stack, dtype=dtype)

    def __call__(self, x: Tokens) -> Tokens:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Block(nnx.Module):
    """One transformer block. `time` holds the modulation for this timestep, to which the block adds its own."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: DTypeLike):
        self.modulation = param(rngs.params(), (6, config.dim), (None, None), stack=stack, dtype=jnp.float32)
        self.norm_self = LayerNorm(config.dim, affine=False, eps=config.eps)
        self.self_attn = Attention(config, rngs=rngs, stack=stack, dtype=dtype)
        self.norm_cross = LayerNorm(config.dim, affine=True, stack=stack, eps=config.eps)
        self.cross_attn = Attention(config, rngs=rngs, stack=stack, dtype=dtype)
        self.norm_ffn = LayerNorm(config.dim, affine=False, eps=config.eps)
        self.ffn = FeedForward(config, rngs=rngs, stack=stack, dtype=dtype)

    def __call__(self, x: Tokens, time: Float[Array, "b six d"], text: Float[Array, "b l d"], rotary: Rotary) -> Tokens:
        x = constrain(x, ACTIVATION)
        modulation = self.modulation[...][None] + time  # float32, like the norms and the gated sums
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=1)

        y = (self.norm_self(x) * (1 + scale1) + shift1).astype(x.dtype)
        with jax.named_scope("self_attn"):
            x = (x + self.self_attn(y, y, rotary) * gate1).astype(x.dtype)

        y = self.norm_cross(x).astype(x.dtype)
        with jax.named_scope("cross_attn"):
            x = x + self.cross_attn(y, text, None)

        y = (self.norm_ffn(x) * (1 + scale2) + shift2).astype(x.dtype)
        with jax.named_scope("ffn"):
            return constrain((x + self.ffn(y) * gate2).astype(x.dtype), ACTIVATION)


class WanTransformer(nnx.Module):
    """Predicts the velocity `noise - clean` of noisy latents.

    Kernels and computation are in `dtype`; time embedding, modulation, norms and softmax stay in float32. `remat`
    names a policy in `tfm_jax.wan.remat.POLICIES`.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.bfloat16):
        self.config = config
        self.dtype = dtype
        self.remat: Remat = "full"
        dim = config.dim

        def linear(features_in: int, features_out: int, dtype: DTypeLike, axes: tuple = (None, "embed")) -> Linear:
            return Linear(features_in, features_out, rngs=rngs, axes=axes, dtype=dtype)

        self.patch_in = PatchEmbedding(config, rngs=rngs, dtype=dtype)
        self.text_in = linear(config.text_dim, dim, dtype)
        self.text_out = linear(dim, dim, dtype)
        self.time_in = linear(config.freq_dim, dim, jnp.float32)
        self.time_out = linear(dim, dim, jnp.float32)
        self.time_projection = linear(dim, 6 * dim, jnp.float32)
        self.blocks = Block(config, rngs=rngs, stack=(config.layers,), dtype=dtype)
        self.head_modulation = param(rngs.params(), (2, dim), (None, None), dtype=jnp.float32)
        self.norm_head = LayerNorm(dim, affine=False, eps=config.eps)
        self.head = linear(dim, config.channels * PATCH[1] * PATCH[2], dtype, ("embed", None))

    @jax.jit
    def __call__(self, latents: Latents, timestep: PerVideo, text: Text) -> Latents:  # pyright: ignore
        """Return the velocity at `latents`, in float32 and with the same shape.

        Args:
            latents: noisy normalised latents `[b f h w c]`, with even h and w.
            timestep: `[b]` in 0..1000, 1000 times the noise level.
            text: embeddings of the prompts `[b l d]`, zero-padded to `text_len` tokens. Attention includes the padding.

        Raises:
            InputError: the mesh of `jax.set_mesh` cannot split the heads or the tokens evenly.
        """
        grid = token_grid(latents.shape[1:])
        check_split(self.config.heads, math.prod(grid))
        x = self.patch_in(constrain(latents.astype(self.dtype), ("batch",)))
        context = self.text_out(jax.nn.gelu(self.text_in(text.astype(self.dtype)), approximate=True))
        time = self.time_out(jax.nn.silu(self.time_in(sinusoidal_embedding(timestep, self.config.freq_dim))))
        block_time = rearrange(self.time_projection(jax.nn.silu(time)), "b (six d) -> b six d", six=6)
        rotary = rotary_tables(grid, self.config.head_dim)

        def body(x: Tokens, block: Block) -> tuple[Tokens, None]:
            return block(x, block_time, context, rotary), None

        # The forward and backward passes are separate loops, so `prevent_cse` is not needed.
        body = jax.checkpoint(body, policy=POLICIES[self.remat], prevent_cse=False)
        x, _ = jax.lax.scan(body, x, self.blocks)

        shift, scale = jnp.split(self.head_modulation[...][None] + time[:, None], 2, axis=1)
        x = self.head((self.norm_head(x) * (1 + scale) + shift).astype(self.dtype))
        # Keep the tokens split up to here, to gather the small output of the head rather than its wide input.
        x = constrain(x, ACTIVATION)
        (gf, gh, gw), (p, q, r) = grid, PATCH
        x = rearrange(x, "b (f h w) (p q r c) -> b (f p) (h q) (w r) c", f=gf, h=gh, w=gw, p=p, q=q, r=r)
        return constrain(x.astype(jnp.float32), ("batch",))


class PatchEmbedding(nnx.Module):
    """A 3-D convolution whose stride equals its kernel size, that is, one linear layer applied to every patch."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        shape = (*PATCH, config.channels, config.dim)
        self.kernel = param(rngs.params(), shape, (None, None, None, None, "embed"), dtype=dtype)
        self.bias = constant(0.0, (config.dim,), ("embed",), dtype=dtype)

    def __call__(self, latents: Latents) -> Tokens:
        p, q, r = PATCH
        patches = rearrange(latents, "b (f p) (h q) (w r) c -> b (f h w) p q r c", p=p, q=q, r=r)
        patches = constrain(patches, ("batch", "tokens"))
        kernel, bias = (gathered(x, latents.dtype) for x in (self.kernel, self.bias))
        tokens = jnp.einsum("bspqrc,pqrcd->bsd", patches, kernel, precision=precision_of(patches, kernel))
        return constrain(tokens + bias, ACTIVATION)
