"""The rule table: how an array of another library's layout becomes a leaf of ours, and back.

Knows shapes and axes and nothing of names, files or programs. Every rule is the same three steps
(split axes, permute them, join them), written down as data, so that each can be undone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Layout", "as_is", "conv", "from_file", "linear", "to_file", "vector"]


class Layout(NamedTuple):
    """How an array in a file relates to a leaf.

    Attributes:
        note: the rule in words, for the table of a mapping.
        source: the array's shape in the file.
        split: the shape that it is reshaped to first.
        axes: how its axes are permuted then.
        shape: the leaf's shape, that it is reshaped to last.
    """

    note: str
    source: tuple[int, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]


def as_is(shape: Sequence[int]) -> Layout:
    """The same array in both places.

    Args:
        shape: of the array and the leaf.

    Returns:
        The layout.

    Example:
        >>> as_is((2, 3)).note
        'as is'
    """
    same = tuple(shape)
    return Layout("as is", same, same, tuple(range(len(same))), same)


def conv(shape: Sequence[int], axes: Sequence[int]) -> Layout:
    """The kernel of a convolution, output channels first in the file (PyTorch's OIHW).

    Args:
        shape: of our kernel.
        axes: where our kernel has the output channels, the input channels and the spatial axes, in
            this order.

    Returns:
        The layout.

    Example:
        >>> conv((3, 3, 16, 32), (3, 2, 0, 1)).source  # HWIO
        (32, 16, 3, 3)
    """
    source = tuple(shape[axis] for axis in axes)
    permuted = tuple(axes.index(axis) for axis in range(len(shape)))
    names = "OI" + "DHW"[5 - len(shape) :] if len(shape) <= 5 else ""
    note = f"{names} to {''.join(names[axis] for axis in permuted)}" if names else "permuted"
    return Layout(note, source, source, permuted, tuple(shape))


def linear(
    shape: Sequence[int], contracted: Sequence[int], flattened: Sequence[int] = ()
) -> Layout:
    """The weights of a dense layer, `[outputs, inputs]` in the file.

    Args:
        shape: of our weights.
        contracted: our axes of inputs; all others are outputs.
        flattened: the shape `(*spatial, channels)` that the inputs were flattened from, if any:
            PyTorch flattens the channels first.

    Returns:
        The layout.

    Example:
        >>> linear((64, 10), [0]).source
        (10, 64)
        >>> linear((12, 10), [0], flattened=(2, 2, 3)).split
        (10, 3, 2, 2)
    """
    free = [axis for axis in range(len(shape)) if axis not in contracted]
    permute = len(contracted) == 1 and _matters(flattened)
    split: list[int] = []
    places: dict[int, list[int]] = {}
    for axis in [*free, *contracted]:
        first = len(split)
        if permute and axis in contracted:
            split += [flattened[-1], *flattened[:-1]]
            places[axis] = [*range(first + 1, len(split)), first]
        else:
            split.append(shape[axis])
            places[axis] = [first]
    axes = tuple(place for axis in range(len(shape)) for place in places[axis])
    source = tuple(math.prod(shape[axis] for axis in part) for part in (free, contracted))
    turned = "transposed" if axes != tuple(range(len(axes))) else "as is"
    note = f"{turned}, inputs {_order(flattened)}" if permute else turned
    return Layout(note, source, tuple(split), axes, tuple(shape))


def vector(shape: Sequence[int], flattened: Sequence[int] = ()) -> Layout:
    """One number for each channel or unit: a bias, scale, mean or variance.

    Args:
        shape: of our leaf.
        flattened: the shape `(*spatial, channels)` that the units were flattened from, if any.

    Returns:
        The layout.

    Example:
        >>> vector((4, 8)).source  # heads by units
        (32,)
    """
    size = math.prod(shape)
    if not (_matters(flattened) and math.prod(flattened) == size):
        return Layout("as is", (size,), (size,), (0,), tuple(shape))
    rank = len(flattened)
    split = (flattened[-1], *flattened[:-1])
    return Layout(_order(flattened), (size,), split, (*range(1, rank), 0), tuple(shape))


def from_file(layout: Layout, array: np.ndarray) -> np.ndarray:
    """The leaf that an array of the file becomes.

    Args:
        layout: the rule.
        array: of shape `layout.source`.

    Returns:
        An array of shape `layout.shape`, the same numbers.

    Example:
        >>> from_file(linear((2, 3), [0]), np.arange(6).reshape(3, 2)).tolist()
        [[0, 2, 4], [1, 3, 5]]
    """
    return np.asarray(array.reshape(layout.split).transpose(layout.axes).reshape(layout.shape))


def to_file(layout: Layout, leaf: np.ndarray) -> np.ndarray:
    """The inverse of `from_file`.

    Args:
        layout: the rule.
        leaf: of shape `layout.shape`.

    Returns:
        An array of shape `layout.source`.

    Example:
        >>> to_file(linear((2, 3), [0]), np.array([[0, 2, 4], [1, 3, 5]])).tolist()
        [[0, 1], [2, 3], [4, 5]]
    """
    permuted = leaf.reshape([layout.split[axis] for axis in layout.axes])
    return np.asarray(permuted.transpose(np.argsort(layout.axes)).reshape(layout.source))


def _matters(flattened: Sequence[int]) -> bool:
    """Whether channels first and channels last are two different orders."""
    return bool(flattened) and flattened[-1] > 1 and math.prod(flattened[:-1]) > 1


def _order(flattened: Sequence[int]) -> str:
    spatial = "DHW"[3 - (len(flattened) - 1) :] if len(flattened) <= 4 else "spatial "
    return f"C{spatial} to {spatial}C"
