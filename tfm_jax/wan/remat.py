"""Rematerialisation policies: which activations of a block are saved for the backward pass.

The input of a block is always saved. What a policy does not save in addition, the backward pass recomputes.
"""

from collections.abc import Callable
from typing import Any

import jax

from tfm_jax.config import Remat
from tfm_jax.wan.attention import ATTENTION_OUTPUT

_policies = jax.checkpoint_policies

POLICIES: dict[Remat, Callable[..., Any]] = {
    # Saves nothing, so the whole block runs twice.
    "full": _policies.nothing_saveable,
    # Saves the outputs of both attentions, the part whose cost grows with the square of the number of tokens.
    "attention": _policies.save_only_these_names(ATTENTION_OUTPUT),
    # Saves the same in host memory: this takes no device memory, but a transfer in each direction.
    "attention_offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ATTENTION_OUTPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # Saves everything that a gradient needs, so nothing runs twice.
    "none": _policies.everything_saveable,
}
