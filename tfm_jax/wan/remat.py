"""Rematerialisation: which values of a block the forward pass keeps for the backward pass, by name.

What is not kept is computed again. Per block, beside its input:
"""

from collections.abc import Callable
from typing import Any

import jax

from tfm_jax.config import Remat
from tfm_jax.wan.attention import ATTENTION_OUTPUT

_policies = jax.checkpoint_policies

POLICIES: dict[Remat, Callable[..., Any]] = {
    # Nothing: the whole block runs twice.
    "full": _policies.nothing_saveable,
    # What both attentions put out, two activations: they are the part that grows with the square of the tokens.
    "attention": _policies.save_only_these_names(ATTENTION_OUTPUT),
    # The same, in the memory of the host: nothing of it stays on the device, and it travels there and back.
    "attention_offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ATTENTION_OUTPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # Everything that a gradient needs: nothing runs twice.
    "none": _policies.everything_saveable,
}
