"""Examples cut into batches of one shape, so that a compiled program can go through them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from megajax.types import PyTree

__all__ = ["Batches", "cut"]


class Batches(NamedTuple):
    """Examples cut into B batches of b; the last one is padded with zeros.

    Attributes:
        inputs: leaves `[B, b, ...]`.
        targets: leaves `[B, b, ...]`.
        valid: `[B, b]` bool; False where padded, and for examples of which nothing counts.
    """

    inputs: PyTree
    targets: PyTree
    valid: Any


def cut(inputs: PyTree, targets: PyTree, batch_size: int, valid: Any = None) -> Batches:
    """Cuts examples into batches, evenly, so that little is padded.

    Args:
        inputs: leaves `[N, ...]`, N >= 1.
        targets: likewise; None for none.
        batch_size: the largest batch to make.
        valid: `[N]` bool, the examples that count; None is all of them.

    Returns:
        `ceil(N / batch_size)` batches of NumPy arrays.

    Example:
        >>> cut(np.zeros((10, 2)), np.zeros(10, int), 6).valid.sum(axis=1).tolist()
        [5, 5]
    """
    total = jax.tree.leaves(inputs)[0].shape[0]
    count = -(-total // batch_size)
    size = -(-total // count)

    def of_leaf(leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        padding = np.zeros((count * size - total, *array.shape[1:]), array.dtype)
        return np.concatenate([array, padding]).reshape(count, size, *array.shape[1:])

    inputs, targets = jax.tree.map(of_leaf, (inputs, targets))
    return Batches(inputs, targets, of_leaf(np.ones(total, bool) if valid is None else valid))
