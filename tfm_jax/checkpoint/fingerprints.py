"""Fingerprints of arrays: 64-bit hashes of their values, computed on the devices."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped, UInt32


class Summary(NamedTuple):
    """What one pass over an array computes."""

    fingerprint: int
    is_finite: bool
    """Whether all values are finite."""


def fingerprints(arrays: Mapping[str, Array]) -> dict[str, int]:
    """Return the fingerprint of every array by name. How an array is split over devices does not matter."""
    return {name: summary.fingerprint for name, summary in summarize(arrays).items()}


def summarize(arrays: Mapping[str, Array]) -> dict[str, Summary]:
    """Return the summary of every array by name."""
    hashed = {name: _hash(array) for name, array in arrays.items()}  # dispatches all before waiting for one
    return {name: _to_host(words, finite) for name, (words, finite) in hashed.items()}


def _to_host(words: UInt32[Array, "2"], finite: Bool[Array, ""]) -> Summary:
    high, low = map(int, np.asarray(words))
    return Summary(high << 32 | low, bool(finite))


@jax.jit
def _hash(x: Shaped[Array, "..."]) -> tuple[UInt32[Array, "2"], Bool[Array, ""]]:
    """Return the two words of the fingerprint, and whether all elements are finite.

    Each word is a sum over all elements. The summand of an element is a mix of its bits and its position. Sums modulo
    2^32 are the same in any order. For a fixed position, different bits always give different summands, so a change of
    a single element always changes both sums. Other changes go unnoticed with a probability of about 2^-64.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        position = position * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    key = _mix(position + jnp.uint32(0x9E3779B9))  # without the constant, the key of the first position would be 0
    first = _mix(bits ^ key)
    second = _mix(first + key)
    return jnp.stack([jnp.sum(word, dtype=jnp.uint32) for word in (first, second)]), jnp.isfinite(x).all()


def _mix(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Apply the finaliser of MurmurHash3 (Appleby, 2011), a bijection.

    Flipping one input bit flips about half of the output bits.
    """
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
