"""A page as a list of blocks, and what becomes of it: Markdown, HTML, or lines in a terminal.

Knows nothing of networks or results. In HTML the style and the pictures (as SVG) are part of the
file, so that it can be sent to somebody and opened without a network.
"""

from __future__ import annotations

import base64
import functools
import html
import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple, TypeAlias

from rich.console import Console

from megajax import tables

__all__ = ["Block", "Heading", "Paragraph", "Picture", "Table", "show", "to_html", "to_markdown"]


class Heading(NamedTuple):
    """A title; the first one of a page is the page's.

    Attributes:
        text: the title.
    """

    text: str


class Paragraph(NamedTuple):
    """A paragraph.

    Attributes:
        text: what it says.
        strong: it stands out.
    """

    text: str
    strong: bool = False


class Table(NamedTuple):
    """A table whose first column names the rows.

    Attributes:
        rows: strings; the first row is the header, and a row of one cell the title of those below.
        strong: names of rows that stand out.
    """

    rows: Sequence[Sequence[str]]
    strong: Sequence[str] = ()


class Picture(NamedTuple):
    """A picture.

    Attributes:
        name: of its file, without folder and ending.
        caption: what it shows.
        wide: it takes the whole width; others stand side by side where there is room.
    """

    name: str
    caption: str
    wide: bool = False


Block: TypeAlias = Heading | Paragraph | Table | Picture


def to_markdown(blocks: Sequence[Block], folder: str = "plots") -> str:
    """The page as Markdown; its pictures are PNG files in a folder beside it.

    Example:
        >>> print(to_markdown([Heading("Title"), Paragraph("Yes.", strong=True)]))
        # Title
        <BLANKLINE>
        **Yes.**
        <BLANKLINE>
    """
    parts = []
    for i, block in enumerate(blocks):
        match block:
            case Heading(text):
                parts.append(f"{'##' if i else '#'} {text}")
            case Paragraph(text, strong):
                parts.append(f"**{text}**" if strong else text)
            case Table(rows, strong):
                parts.append(tables.to_markdown(rows, strong))
            case Picture(name, caption, _):
                parts.append(f"![{caption}]({folder}/{name}.png)\n\n*{caption}*")
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """The page as one HTML file.

    Args:
        blocks: the page; the first one is its title.
        pictures: name of a picture -> SVG.

    Returns:
        The document.

    Example:
        >>> "<p>1 &lt; 2</p>" in to_html([Heading("Title"), Paragraph("1 < 2")], {})
        True
    """
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    parts = []
    for in_row, group in itertools.groupby(enumerate(blocks), lambda one: _is_small(one[1])):
        elements = "\n".join(_element(i, block, pictures) for i, block in group)
        parts.append(f'<div class="pictures">\n{elements}\n</div>' if in_row else elements)
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    )


def show(blocks: Sequence[Block], console: Console, *, whole: bool = False) -> None:
    """Prints the page, without its pictures; no word is broken that fits on a line.

    Args:
        blocks: the page.
        console: where to.
        whole: what finds no room in the lines of a table follows below; else it is left out.

    Example:
        >>> show([Heading("Title"), Table([("", "x"), ("one", "1")])], Console(width=20))
        Title
             x
        one  1
    """
    say = functools.partial(console.print, highlight=False, markup=False)
    for block in blocks:
        match block:
            case Heading(text):
                say(text, style="bold")
            case Paragraph(text, strong):
                say(text, style="bold" if strong else None)
            case Table(rows, names):
                for part in tables.split(rows, console.width) if whole else [rows]:
                    for row, line in zip(part, tables.to_text(part, console.width), strict=True):
                        title = "italic" if len(row) == 1 else None
                        style = "bold" if row[0] in names else title
                        say(line, style=style, soft_wrap=True)


_FEW_COLUMNS = 4  # a table of no more is not stretched

_STYLE = (resources.files("megajax.report") / "style.css").read_text("utf-8")


def _is_small(block: Block) -> bool:
    return isinstance(block, Picture) and not block.wide


def _element(position: int, block: Block, pictures: Mapping[str, bytes]) -> str:
    match block:
        case Heading(text):
            level = "h2" if position else "h1"
            return f"<{level}>{html.escape(text)}</{level}>"
        case Paragraph(text, strong):
            return f"<p{_mark(strong)}>{html.escape(text)}</p>"
        case Table(rows, strong):
            right = tables.numeric(rows)
            head = _cells("th", rows[0], right, ' scope="col"')
            lines = "\n".join(_row(row, right, row[0] in strong) for row in rows[1:])
            wide = ' class="wide"' if len(right) > _FEW_COLUMNS else ""
            return (
                f'<div class="scroll"><table{wide}>\n<thead><tr>{head}</tr></thead>\n'
                f"<tbody>\n{lines}\n</tbody>\n</table></div>"
            )
        case Picture(name, caption, wide):
            data = base64.b64encode(pictures[name]).decode()
            text, kind = html.escape(caption), ' class="wide"' if wide else ""
            image = f'<img src="data:image/svg+xml;base64,{data}" alt="{text}">'
            return (
                f'<figure{kind}><div class="scroll">{image}</div>'
                f"<figcaption>{text}</figcaption></figure>"
            )


def _row(row: Sequence[str], right: Sequence[bool], strong: bool) -> str:
    name = html.escape(row[0])
    if len(row) == 1 < len(right):
        empty = f'<td colspan="{len(right) - 1}"></td>'
        return f'<tr class="group"><th scope="rowgroup">{name}</th>{empty}</tr>'
    cells = _cells("td", row[1:], right[1:])
    return f'<tr{_mark(strong)}><th scope="row">{name}</th>{cells}</tr>'


def _cells(tag: str, cells: Sequence[str], right: Sequence[bool], attributes: str = "") -> str:
    sides = (' class="right"' if numbers else "" for numbers in right)
    return "".join(
        f"<{tag}{attributes}{side}>{html.escape(cell)}</{tag}>"
        for cell, side in zip(cells, sides, strict=True)
    )


def _mark(strong: bool) -> str:
    return ' class="strong"' if strong else ""
