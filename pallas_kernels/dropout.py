"""Dropout whose bits are a hash: a function of a key and of the place of a number, in any layout and on any device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def keep(place: jax.Array, key: jax.Array | Sequence[jax.Array], rate: float) -> jax.Array:
    """Which places are kept: all but a share `rate`.

    Args:
        place: uint32, the index of each number in the whole array, modulo 2^32.
        key: two words, uint32.
        rate: from 0 up to 1.

    Returns:
        bool, of `place`'s shape.
    """
    return _mix(_mix(place ^ key[0]) ^ key[1]) >= jnp.uint32(round(rate * 2**32))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit depends on every other (Wellons' `lowbias32`)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
