"""Names for the values that travel between modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

__all__ = ["ApplyFn", "Bound", "Genes", "Key", "Method", "PyTree", "bind"]

PyTree: TypeAlias = Any
"""Any nesting of containers with arrays at the leaves."""

Key: TypeAlias = jax.Array
"""A PRNG key, typed (`jax.random.key`) or old-style uint32."""

Genes: TypeAlias = Any
"""Genes of a population: a pytree whose leaves have a leading population axis P."""

ApplyFn: TypeAlias = Callable[[PyTree, Any], Any]
"""`apply_fn(variables, inputs) -> outputs`: all that megajax knows of a network. Inputs and outputs
are any pytrees whose leaves have a leading example axis."""


@dataclass(frozen=True)
class Bound:
    """A function with some keyword arguments fixed.

    Unlike those of `functools.partial`, equal ones compare equal and share compiled programs.

    Attributes:
        function: the function.
        options: names and values of the fixed arguments, in alphabetical order; hashable values.
    """

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function."""
        return self.function(*arguments, **dict(self.options))


def bind(function: Callable[..., Any], **options: Any) -> Bound:
    """Fixes keyword arguments of a function, which may be bound already.

    Example:
        >>> bind(sorted, reverse=True)([1, 3, 2])
        [3, 2, 1]
        >>> bind(sorted, reverse=True) == bind(sorted, reverse=True)
        True
    """
    if isinstance(function, Bound):
        options = dict(function.options) | options
        function = function.function
    return Bound(function, tuple(sorted(options.items())))


@dataclass(frozen=True)
class Method:
    """A method of a value. Unlike bound methods, those of equal values compare equal.

    Attributes:
        owner: the value; hashable.
        name: of the method.
    """

    owner: Any
    name: str

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Calls the method."""
        return getattr(self.owner, self.name)(*arguments, **options)
