"""Streams of random numbers by name, so that what is added somewhere changes no other draw."""

from __future__ import annotations

import zlib

import jax
import numpy as np

from megajax.types import Key

__all__ = ["as_key", "named_key"]


def as_key(key: Key | int) -> Key:
    """A key as it is, or that of a whole number.

    Example:
        >>> bool(as_key(3) == jax.random.key(3))
        True
    """
    return jax.random.key(key) if isinstance(key, (int, np.integer)) else key


def named_key(key: Key, name: str) -> Key:
    """The key of a stream that belongs to a name.

    Example:
        >>> key = jax.random.key(0)
        >>> bool(named_key(key, "data") == jax.random.fold_in(key, zlib.crc32(b"data")))
        True
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
