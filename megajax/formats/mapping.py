"""What a mapping is: which array of a file becomes which leaf, and by what rule. Plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from megajax.formats.layouts import Layout

__all__ = ["Entry", "NameMap", "dims", "some"]

_LISTED = 10
_RARE = 2


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

    def describe(self, short: bool = False) -> str:
        """The mapping as a table with a line for each array.

        Args:
            short: only how many arrays follow each rule, which ones follow a rare one, and what no
                leaf takes.

        Example:
            >>> layout = Layout("transposed", (10, 64), (10, 64), (1, 0), (64, 10))
            >>> names = NameMap("a.npz", (Entry("fc.weight", "head/kernel", layout),), ("epoch",))
            >>> print(names.describe())
            a.npz      shape    leaf         shape    rule
            fc.weight  [10,64]  head/kernel  [64,10]  transposed
            epoch               -                     ignored
            >>> print(names.describe(short=True))
            a.npz: 1 array becomes a leaf (1 transposed)
              fc.weight becomes head/kernel, transposed
              ignored: epoch
        """
        if short:
            return self._summary()
        rows = [(self.file, "shape", "leaf", "shape", "rule")]
        for name, path, layout in self.entries:
            rows.append((name, dims(layout.source), path, dims(layout.shape), layout.note))
        rows += [(name, "", "-", "", "ignored") for name in self.ignored]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = (map(str.ljust, row, widths) for row in rows)
        return "\n".join("  ".join(row).rstrip() for row in padded)

    def _summary(self) -> str:
        rules = Counter(entry.layout.note for entry in self.entries)
        counts = "; ".join(f"{count} {rule}" for rule, count in rules.most_common())
        become = "array becomes a leaf" if len(self.entries) == 1 else "arrays become leaves"
        lines = [f"{self.file}: {len(self.entries)} {become} ({counts})"]
        lines += [
            f"  {name} becomes {path}, {layout.note}"
            for name, path, layout in self.entries
            if layout.note != "as is" and rules[layout.note] <= _RARE
        ]
        if self.ignored:
            kinds = Counter(name.rpartition(".")[2] for name in self.ignored)
            alike = [f"{count} {kind}" for kind, count in kinds.items() if count > 1]
            single = [name for name in self.ignored if kinds[name.rpartition(".")[2]] == 1]
            lines.append(f"  ignored: {some([*alike, *single])}")
        return "\n".join(lines)


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
