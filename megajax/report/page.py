"""A page as a list of blocks, and its two renderings: Markdown, and HTML that needs nothing else.

Knows nothing of networks or results. In HTML the style and the pictures (as SVG) are part of the
file, so that it can be sent to somebody and opened without a network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

__all__ = ["Block", "Heading", "Paragraph", "Picture", "Table", "to_html", "to_markdown"]


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
        rows: strings; the first row is the header.
        strong: names of rows that stand out.
    """

    rows: Sequence[Sequence[str]]
    strong: Sequence[str] = ()


class Picture(NamedTuple):
    """A picture.

    Attributes:
        name: of its file, without folder and ending.
        caption: what it shows.
    """

    name: str
    caption: str


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
                header, *body = (_bold(row, strong) for row in rows)
                lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            case Picture(name, caption):
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
    body = "\n".join(_element(i, block, pictures) for i, block in enumerate(blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    )


_STYLE = """\
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.strong { font-size: 1.15rem; font-weight: 600; padding: .7rem 1rem; background: #f2f5f8;
           border-left: 4px solid #d55e00; }
div.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
thead th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; font-weight: inherit; }
tr.strong { font-weight: 700; background: #fdf3ec; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #444; }
"""


def _element(position: int, block: Block, pictures: Mapping[str, bytes]) -> str:
    match block:
        case Heading(text):
            level = "h2" if position else "h1"
            return f"<{level}>{html.escape(text)}</{level}>"
        case Paragraph(text, strong):
            return f"<p{_mark(strong)}>{html.escape(text)}</p>"
        case Table(rows, strong):
            header, *body = rows
            head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
            lines = "\n".join(_row(row, row[0] in strong) for row in body)
            return (
                f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n'
                f"<tbody>\n{lines}\n</tbody>\n</table></div>"
            )
        case Picture(name, caption):
            data = base64.b64encode(pictures[name]).decode()
            text = html.escape(caption)
            return (
                f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{text}">'
                f"<figcaption>{text}</figcaption></figure>"
            )


def _row(row: Sequence[str], strong: bool) -> str:
    name, *cells = map(html.escape, row)
    columns = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr{_mark(strong)}><th scope="row">{name}</th>{columns}</tr>'


def _mark(strong: bool) -> str:
    return ' class="strong"' if strong else ""


def _bold(row: Sequence[str], strong: Sequence[str]) -> list[str]:
    return [f"**{cell}**" if cell and row[0] in strong else cell for cell in row]
