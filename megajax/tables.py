"""Tables as rows of strings, written as Markdown and as text that fits a terminal.

The first row is the header, the first column names the rows, and a row of one cell is the title of
those below it. Knows strings only.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

__all__ = ["numeric", "split", "to_markdown", "to_text"]


def numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers and are set to the right.

    Example:
        >>> numeric([("", "test", "saw labels"), ("one", "81.5 %", "no")])
        [False, True, False]
    """
    full = [row for row in rows[1:] if len(row) > 1]
    return [
        i > 0 and all(row[i][:1] in "+-<0123456789" for row in full) for i in range(len(rows[0]))
    ]


def to_markdown(rows: Sequence[Sequence[str]], strong: Collection[str] = ()) -> str:
    r"""The table in Markdown; columns of numbers are set to the right.

    Args:
        rows: the table.
        strong: names of rows that stand out.

    Example:
        >>> print(to_markdown([("", "a|b"), ("Parents",), ("one", "+1.5")], strong=["one"]))
        |  | a\|b |
        | --- | ---: |
        | *Parents* |  |
        | **one** | **+1.5** |
    """
    header, *body = rows

    def line(row: Sequence[str]) -> str:
        mark = "**" if row[0] in strong else "*" if len(row) == 1 < len(header) else ""
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
        cells = [f"{mark}{cell}{mark}" if cell else "" for cell in cells]
        return f"| {' | '.join([*cells, *[''] * (len(header) - len(cells))])} |"

    rule = "| " + " | ".join("---:" if numbers else "---" for numbers in numeric(rows)) + " |"
    return "\n".join([line(header), rule, *map(line, body)])


def split(rows: Sequence[Sequence[str]], width: int) -> list[list[Sequence[str]]]:
    """The table as several ones, each with as many columns as find room, none left out.

    Example:
        >>> split([("", "one run", "another"), ("test", "81.5 %", "82.0 %")], 14)
        [[('', 'one run'), ('test', '81.5 %')], [('', 'another'), ('test', '82.0 %')]]
    """
    parts = []
    while len(rows[0]) > 1:
        fitting = 1 + len(_widths(rows, width)[1])
        parts.append([row[:fitting] for row in rows])
        rows = [(*row[:1], *row[fitting:]) for row in rows]
    return parts


def _widths(rows: Sequence[Sequence[str]], width: int) -> tuple[int, list[int]]:
    """The least width of the first column, and those of the others that find room, at least one."""
    full = [row for row in rows if len(row) > 1]
    columns = zip(*full, strict=True)
    next(columns)
    words = [max(map(len, (*column[0].split(), *column[1:]))) for column in columns]
    least = max(len(word) for row in full for word in row[0].split() or [""])
    while len(words) > 1 and least + sum(2 + n for n in words) > width:
        words.pop()
    return least, words


def to_text(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    r"""The table as one text for each row, of several lines where the name of the row needs them.

    Words are never broken: columns that find no room are left out, the last one first.

    Args:
        rows: the table.
        width: of a line.

    Example:
        >>> rows = [("network", "test", "loss"), ("a long name", "81.5 %", "0.5")]
        >>> print(*to_text(rows, 19), sep="\n")
        network        test
        a long name  81.5 %
        >>> print(*to_text(rows, 15), sep="\n")
        network    test
        a long   81.5 %
        name
    """
    least, others = _widths(rows, width)
    room = max(least, width - sum(2 + n for n in others))
    widths = [min(room, max(len(row[0]) for row in rows if len(row) > 1)), *others]

    def text(row: Sequence[str]) -> str:
        if len(row) == 1:
            return textwrap.fill(row[0], width, break_long_words=False)
        cells = [
            textwrap.wrap(cell, n, break_long_words=False, break_on_hyphens=False)
            for cell, n in zip(row, widths, strict=False)
        ]
        lines = []
        for i in range(max(map(len, cells), default=0)):
            first, *others = (cell[i] if i < len(cell) else "" for cell in cells)
            aligned = (part.rjust(n) for part, n in zip(others, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
        return "\n".join(lines)

    return [text(row) for row in rows]
