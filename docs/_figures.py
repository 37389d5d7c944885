"""The drawings of the method page.

    python docs/_figures.py

writes `group.svg`, `mask.svg` and `generation.svg` beside this file, with the same bytes each time.
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent
BLUE, YELLOW, ORANGE, INK, PALE = "#0072b2", "#e69f00", "#d55e00", "#222222", "#eef3f7"
UNITS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"]


def main():
    """Draws all of them."""
    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "megajax", "font.size": 11, "text.color": INK})
    for draw in (group, mask, generation):
        figure = draw()
        figure.savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})
        plt.close(figure)


def group():
    """A permutation group: everything that belongs to a hidden unit moves with it."""
    figure, axes = _canvas(9.6, 3.9)
    order = [2, 0, 3, 1]
    for left, units, title in ((0.2, [0, 1, 2, 3], "as it is"), (5.3, order, "permuted")):
        colours = [UNITS[unit] for unit in units]
        axes.text(left + 1.95, 3.55, title, ha="center", weight="bold")
        _grid(axes, left, 1.4, [colours] * 3, "kernel, its columns")
        _grid(axes, left, 0.55, [colours], "bias")
        _grid(axes, left + 2.3, 1.0, [[colour] * 3 for colour in colours], "next kernel, its rows")
        for column, unit in enumerate(units):
            axes.text(left + 0.25 + 0.5 * column, 3.05, f"{unit}", ha="center")
    _arrow(axes, (4.25, 2.0), (5.1, 2.0))
    axes.text(4.68, 2.15, "same\nfunction", ha="center", va="bottom", fontsize=10)
    return figure


def mask():
    """A mask: each hidden unit of the child has its own mixture of the parents' units."""
    figure, axes = _canvas(9.6, 3.5)
    shares = np.array([1.0, 0.7, 0.5, 0.0])  # of parent 0, for each hidden unit
    mixed = [_between(YELLOW, BLUE, share) for share in shares]
    for left, rows, title in (
        (0.2, [[BLUE] * 4] * 3, "parent 0"),
        (2.9, [[YELLOW] * 4] * 3, "parent 1, aligned"),
        (7.3, [mixed] * 3, "child"),
    ):
        _grid(axes, left, 1.2, rows, title, above=True)
    axes.text(2.55, 1.95, "+", ha="center", va="center", fontsize=20)
    _arrow(axes, (5.1, 1.95), (7.1, 1.95))
    axes.text(6.1, 3.05, "mask", ha="center", weight="bold")
    for unit, share in enumerate(shares):
        y = 2.6 - 0.42 * unit - (0.42 if unit > 1 else 0)
        axes.text(6.1, y, f"unit {unit}: {share:.1f}, {1 - share:.1f}", ha="center", va="center")
    for unit, share in enumerate(shares):
        x = 7.3 + 0.5 * unit + 0.25
        axes.text(x, 1.0, f"{share:.1f}", ha="center", va="top", color=BLUE)
        axes.text(x, 0.65, f"{1 - share:.1f}", ha="center", va="top", color="#9a6a00")
    return figure


def generation():
    """A generation of the genetic algorithm."""
    figure, axes = _canvas(9.6, 3.7)
    steps = [
        ("select", "two parents for\neach child"),
        ("cross", "genes of one\nor the other"),
        ("mutate", "noise on a\nfew genes"),
        ("repair", "back onto\nthe simplex"),
        ("score", "express, predict,\ncompare: one\ncompiled program"),
    ]
    for place, (name, text) in enumerate(steps):
        left = 0.15 + 1.9 * place
        last = name == "score"
        _box(axes, left, 1.9, 1.6, 1.5, name, text, ORANGE if last else BLUE)
        if not last:
            _arrow(axes, (left + 1.63, 2.65), (left + 1.87, 2.65))
    _box(axes, 2.05, 0.15, 5.4, 0.95, "population", "genes and fitness of P individuals", INK)
    _arrow(axes, (2.0, 0.6), (0.95, 1.85), "arc3,rad=-0.35")
    _arrow(axes, (8.55, 1.85), (7.5, 0.6), "arc3,rad=-0.35")
    axes.text(8.6, 0.75, "the best of\nold and new\nsurvive", va="center", fontsize=10)
    return figure


def _canvas(width, height):
    figure = plt.figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes([0, 0, 1, 1])
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _grid(axes, left, bottom, rows, title, above=False):
    """Squares in colours; the first row on top."""
    for row, colours in enumerate(reversed(rows)):
        for column, colour in enumerate(colours):
            place = left + 0.5 * column, bottom + 0.5 * row
            axes.add_patch(Rectangle(place, 0.5, 0.5, facecolor=colour, edgecolor="white", lw=2))
    middle, height = left + 0.25 * len(rows[0]), 0.5 * len(rows)
    if above:
        axes.text(middle, bottom + height + 0.35, title, ha="center", weight="bold")
    else:
        axes.text(middle, bottom - 0.08, title, ha="center", va="top", fontsize=10)


def _box(axes, left, bottom, width, height, name, text, colour):
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, boxstyle=style, fc=PALE, ec=colour, lw=1.8)
    )
    middle = left + width / 2
    axes.text(middle, bottom + height - 0.12, name, ha="center", va="top", weight="bold")
    axes.text(middle, bottom + height - 0.48, text, ha="center", va="top", fontsize=10)


def _arrow(axes, start, end, curve="arc3"):
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "color": INK, "lw": 1.5}
    axes.add_patch(
        FancyArrowPatch(start, end, connectionstyle=curve, shrinkA=0, shrinkB=0, **style)
    )


def _between(first, second, share):
    low, high = (np.array(matplotlib.colors.to_rgb(colour)) for colour in (first, second))
    return tuple((1 - share) * low + share * high)


if __name__ == "__main__":
    main()
