"""umT5 beside transformers' `UMT5EncoderModel`."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import UMT5Config, UMT5EncoderModel

from benchmarks import ours, peers
from benchmarks.sizes import Sizes, TextWork
from benchmarks.timing import Program, Row, race

PEER = "transformers' UMT5EncoderModel"


def measure(sizes: Sizes) -> Iterator[Row]:
    for work in sizes.text:
        ids = np.random.default_rng(0).integers(0, work.config.vocab_size, (work.batch, work.tokens), np.int32)
        yield race(
            "text_encoder", f"encode, {work}", _ours(work, ids, sizes), PEER, _torch(work, ids, sizes), sizes.budget
        )


def _ours(work: TextWork, ids: np.ndarray, sizes: Sizes) -> Program:
    model = ours.text_encoder(work.config, sizes)
    tokens, mask = jnp.asarray(ids), jnp.ones(ids.shape, jnp.int32)
    return lambda: jax.block_until_ready(model(tokens, mask))


def _torch(work: TextWork, ids: np.ndarray, sizes: Sizes) -> Program:
    config = work.config
    with peers.created_on(sizes):
        model: Any = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                num_heads=config.heads,
                d_kv=config.head_dim,
                d_ff=config.ffn_dim,
                num_layers=config.layers,
            )
        )
    model.eval().requires_grad_(False)
    tokens = torch.from_numpy(ids).to(peers.device_of(sizes), torch.int64)
    mask = torch.ones_like(tokens)
    return peers.program(sizes, lambda: model(tokens, mask).last_hidden_state)
