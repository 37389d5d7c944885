"""What a mapping is: which array of a file becomes which leaf, and by what rule. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megajax.formats.layouts import Layout
from megajax.formats.uses import Slot
from megajax.types import PyTree

__all__ = ["Entry", "NameMap", "Target", "dims", "some"]

_LISTED = 10


class Entry(NamedTuple):
    """One array and the leaf that it becomes.

    Attributes:
        name: of the array, in the file.
        path: of the leaf.
        layout: the rule.
    """

    name: str
    path: str
    layout: Layout


class NameMap(NamedTuple):
    """Which array of a file becomes which leaf.

    Attributes:
        file: path of the file.
        entries: one for each leaf, in flattening order.
        ignored: names of arrays that no leaf takes.
    """

    file: str
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()

    def describe(self) -> str:
        """The mapping as a table.

        Returns:
            One line for each array.

        Example:
            >>> layout = Layout("transposed", (10, 64), (10, 64), (1, 0), (64, 10))
            >>> print(NameMap("a.npz", (Entry("fc.weight", "head/kernel", layout),)).describe())
            a.npz      shape    leaf         shape    rule
            fc.weight  [10,64]  head/kernel  [64,10]  transposed
        """
        rows = [(self.file, "shape", "leaf", "shape", "rule")]
        for name, path, layout in self.entries:
            rows.append((name, dims(layout.source), path, dims(layout.shape), layout.note))
        rows += [(name, "", "-", "", "ignored") for name in self.ignored]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        padded = [
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]
            )
            for row in rows
        ]
        return "\n".join(padded)


class Target(NamedTuple):
    """The network that a file is to be loaded into.

    Attributes:
        variables: of one network, or their shapes and dtypes.
        layers: `layers()` finds the modules that its leaves would be in PyTorch, in the order of
            the program (see `uses.find_modules`); None if there is no program to find them in.
    """

    variables: PyTree
    layers: Callable[[], Sequence[tuple[Slot, ...]]] | None = None


def dims(shape: Sequence[int]) -> str:
    """A shape as it is written in messages.

    Example:
        >>> dims((2, 3))
        '[2,3]'
    """
    return f"[{','.join(map(str, shape))}]"


def some(items: Sequence[str], separator: str = ", ") -> str:
    """The first ten of many things, and how many more there are.

    Example:
        >>> some([str(n) for n in range(12)])
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return separator.join(items[:_LISTED]) + more
