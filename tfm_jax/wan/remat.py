"""Rematerialisation policies: which activations of a block are saved for the backward pass.

The input of a block is always saved. The backward pass recomputes whatever the policy does not save in addition.
"""

from collections.abc import Callable
from typing import Any

import jax

from tfm_jax.config import Remat
from tfm_jax.wan.attention import ATTENTION_OUTPUT
from tfm_jax.wan.layers import LINEAR_OUTPUT

_policies = jax.checkpoint_policies

POLICIES: dict[Remat, Callable[..., Any]] = {
    # Saves nothing else, so the backward pass runs the whole block again.
    "full": _policies.nothing_saveable,
    # Saves the outputs of self-attention and cross-attention. Recomputing self-attention would be expensive: its cost
    # grows with the square of the number of tokens.
    "attention": _policies.save_only_these_names(ATTENTION_OUTPUT),
    # Saves the same outputs in host memory. This takes no device memory, but one transfer in each direction.
    "attention_offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ATTENTION_OUTPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # Saves what matrix products and attention return, so that only elementwise operations are recomputed. Saving their
    # results, too, takes more memory and, because they are cheaper to compute than to store, more time.
    "none": _policies.save_only_these_names(ATTENTION_OUTPUT, LINEAR_OUTPUT),
}
