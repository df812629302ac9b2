"""Trees of arrays as flat dictionaries."""

from typing import Any

import jax

Arrays = dict[str, Any]
"""Path -> array, or abstract array with a sharding."""


def flatten(tree: Any) -> Arrays:
    """Return the leaves of a tree by their paths, such as `lora/blocks/self_attn/q/lora_a/value`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def unflatten(tree: Any, arrays: Arrays) -> Any:
    """Return `tree` with every leaf replaced by the array of the same path."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    return jax.tree.unflatten(structure, [arrays[_name(path)] for path, _ in leaves])


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
