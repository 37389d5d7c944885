"""Names for the values that travel between modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

__all__ = ["ApplyFn", "Genes", "Key", "PyTree"]

PyTree: TypeAlias = Any
"""Any nesting of containers with arrays at the leaves."""

Key: TypeAlias = jax.Array
"""A PRNG key, typed (`jax.random.key`) or old-style uint32."""

Genes: TypeAlias = Any
"""Genes of a population: a pytree whose leaves have a leading population axis P."""

ApplyFn: TypeAlias = Callable[[PyTree, jax.Array], jax.Array]
"""`apply_fn(variables, inputs [b, ...]) -> logits [b, C]`: all that megajax knows of a network."""
