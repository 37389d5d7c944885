"""Tutorials: Python files in cells, run while the site is built; a page shows what they print.

A file in `docs/tutorials` is a notebook in the percent format: Python runs it as it stands, and
Jupyter (with jupytext), VS Code and PyCharm open it cell by cell. A cell that fails ends the build.
"""

import base64
import contextlib
import io
import json
import re
import sys
import tempfile
import types
from functools import cache
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt


class Cell(NamedTuple):
    """A cell, what it printed, and the figures (PNG) that it drew."""

    is_text: bool
    source: str
    printed: str = ""
    figures: tuple[bytes, ...] = ()


def cells_of(text):
    """The cells of a file, not run yet."""
    parts = re.split(r"^# %%( \[markdown\])?\n", text, flags=re.MULTILINE)[1:]
    for kind, source in zip(parts[::2], parts[1::2], strict=True):
        is_text = kind is not None
        plain = re.sub(r"^# ?", "", source, flags=re.MULTILINE) if is_text else source
        yield Cell(is_text, plain.strip())


def made(file):
    """What the site gets of a tutorial, by file name: its page, its pictures and its notebook."""
    cells = run(file.name, file.read_text())
    text, pictures = page(file.stem, cells)
    return {f"{file.stem}.md": text, **pictures, f"{file.stem}.ipynb": notebook(cells)}


@cache
def run(path, text):
    """The cells, run one after the other in an empty folder."""
    module = types.ModuleType("tutorial")  # where classes look their module up
    sys.modules[module.__name__] = module
    matplotlib.use("agg")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return [cell if cell.is_text else _run(cell, path, module) for cell in cells_of(text)]


def _run(cell, path, module):
    printed, figures = io.StringIO(), []
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(cell.source, path, "exec"), module.__dict__)
    except Exception as error:
        raise RuntimeError(f"{path}: this cell failed:\n\n{cell.source}\n") from error
    for number in plt.get_fignums():
        figures.append(io.BytesIO())
        plt.figure(number).savefig(figures[-1], format="png", dpi=110)
    plt.close("all")
    return cell._replace(
        printed=printed.getvalue().strip("\n"), figures=tuple(one.getvalue() for one in figures)
    )


def page(name, cells):
    """A tutorial as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for cell in cells:
        if cell.is_text:
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        if cell.printed:
            parts.append(f'```{{ .text .printed title="prints" }}\n{cell.printed}\n```')
        for data in cell.figures:
            file = f"{name}-{len(pictures)}.png"
            pictures[file] = data
            parts.append(f"![What the code above draws]({file})")
    link = f"[Download as a notebook]({name}.ipynb){{ .md-button download }}"
    return "\n\n".join([*parts, link]) + "\n", pictures


def notebook(cells):
    """The same as a Jupyter notebook, outputs included."""
    listed = []
    for number, cell in enumerate(cells):
        common = {"id": f"cell-{number}", "metadata": {}, "source": cell.source}
        if cell.is_text:
            listed.append({"cell_type": "markdown", **common})
            continue
        outputs = []
        if cell.printed:
            text = cell.printed + "\n"
            outputs.append({"output_type": "stream", "name": "stdout", "text": text})
        for data in cell.figures:
            image = {"image/png": base64.b64encode(data).decode()}
            outputs.append({"output_type": "display_data", "data": image, "metadata": {}})
        code = {"cell_type": "code", "execution_count": None, "outputs": outputs}
        listed.append({**code, **common})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = {
        "cells": listed,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1) + "\n"
