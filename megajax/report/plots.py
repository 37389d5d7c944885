"""The pictures of a report: functions from plain data to a matplotlib figure.

Colours are Okabe and Ito's and, for what is no parent, Paul Tol's, which stay apart for
colour-blind readers; markers and line styles say the same once more. A network has the same colour
in every picture: parents in turn, merged vermilion, the ensemble black, others by their group.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megajax.evaluation.results import BEST, ON_TEST, Comparison, Row, name_of

__all__ = [
    "FORMATS",
    "plot_accuracy",
    "plot_fitness",
    "plot_front",
    "plot_mask",
    "plot_path",
    "plot_per_class",
    "plot_robustness",
    "rendered",
]

FORMATS = ("png", "pdf")
"""What is stored: one for the screen, one for a paper. Pages hold SVG."""

_PARENTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#999999", "#666666")
_MERGED = "#D55E00"
_GROUPS = {
    "without search": "#332288",
    "by search": "#882255",
    "fine-tuned": "#117733",
    "ensemble": "#000000",
}
_REST = "#332288"
_LINES = ("#888888", "#0072B2", "#009E73", "#CC79A7")
_MANY_CLASSES = 30
_MANY_LETTERS = 100
_MANY_LAYERS = 80
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "image.aspect": "auto",
    "image.interpolation": "nearest",
    "grid.color": "0.92",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "megajax",  # names inside the file that do not change from run to run
    "pdf.fonttype": 42,  # text that can be searched and edited
}

P = ParamSpec("P")


class _Look(NamedTuple):
    color: str
    marker: str
    linestyle: str


def _look(key: str, group: str = "") -> _Look:
    """How a network is drawn, wherever it is drawn."""
    if key.startswith("parent_"):
        k = int(key.removeprefix("parent_"))
        return _Look(_PARENTS[k % len(_PARENTS)], "os^vDPXh"[k % 8], "--")
    fixed = {
        BEST: _Look("#0072B2", "o", "--"),
        ON_TEST: _Look("#E69F00", "s", "--"),
        "merged": _Look(_MERGED, "*", "-"),
        "ensemble": _Look("#000000", "d", ":"),
    }
    return fixed.get(key, _Look(_GROUPS.get(group, _REST), ".", "-."))


def _styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            figure = function(*args, **kwargs)
            # Laid out once, not again for every format.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure

    return styled


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as the content of a file, the same bytes for the same figure.

    Args:
        figure: from one of the functions below.
        kind: `png`, `pdf` or `svg`.

    Returns:
        The content.

    Example:
        >>> rendered(Figure(), "png")[1:4]
        b'PNG'
    """
    dates: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, dpi=200, metadata=dates.get(kind))
    return buffer.getvalue()


@_styled
def plot_fitness(
    history: Sequence[Mapping[str, Any]], metric: str = "", parents: Sequence[float | None] = ()
) -> Figure:
    """Fitness over generations: best ever, median, and the range from worst to best.

    Args:
        history: the lines of `metrics.jsonl`.
        metric: what fitness is, with its unit.
        parents: fitness of each parent as it was given; None where it is not known.

    Returns:
        The figure. Of the parents, the best one is always in it; those far below it are named.
    """
    of = {
        name: np.array([np.nan if row[name] is None else row[name] for row in history])
        for name in ("generation", "best_ever", "median", "best", "worst")
    }
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    x, population = of["generation"], "#777777"
    band = axes.fill_between(x, of["worst"], of["best"], color=population, alpha=0.18, lw=0)
    (median,) = axes.plot(x, of["median"], color=population)
    (best,) = axes.plot(x, of["best_ever"], color=_MERGED, lw=2)
    names = {
        "best so far": best,
        "median of the population": median,
        "from worst to best": band,
    }
    levels = {k: level for k, level in enumerate(parents) if level is not None}
    # The random individuals of the first generations would squeeze the rest of the picture.
    late = np.nanmin(of["median"][len(x) // 5 :], initial=of["best_ever"][0])
    high = np.nanmax(of["best_ever"])
    low = min(late, max(levels.values(), default=late))
    low = min([late, *(level for level in levels.values() if level >= low - (high - low))])
    for k, level in levels.items():
        look = _look(f"parent_{k}")
        line = axes.axhline(level, color=look.color, linestyle=look.linestyle, lw=1.2)
        names[f"parent {k}" + ("" if level >= low else f" (below, {level:.3g})")] = line
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("generation")
    axes.set_ylabel(f"fitness: {metric}" if metric else "fitness on validation data")
    figure.legend(list(names.values()), list(names), loc="outside upper center", ncols=3)
    return figure


@_styled
def plot_accuracy(found: Comparison) -> Figure:
    """Accuracy of all methods on validation and test, and the differences to the best parent.

    Args:
        found: from `megajax.evaluation.results.comparison`.

    Returns:
        The figure, grouped as the tables are; bars are 95 % intervals.
    """
    tested = any(row.difference is not None for row in found.rows)
    lines: list[str | Row] = []
    for group, members in found.groups():
        lines += [group.capitalize(), *members]
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(lines)), layout="constrained")
    panels = figure.subplots(1, 2 if tested else 1, sharey=True, squeeze=False)[0]
    for y, row in enumerate(lines):
        if isinstance(row, str):
            continue
        colour = _look(row.key, row.group).color
        _whisker(panels[0], 100 * np.array(row.validation), y - 0.17, colour, filled=False)
        _whisker(panels[0], 100 * np.array(row.test), y + 0.17, colour, filled=True)
        if row.difference is not None:
            _whisker(panels[1], 100 * np.array(row.difference[:3]), y, colour, filled=True)
    # Keys of a neutral colour, drawn nowhere.
    handles: dict[str, Any] = {
        part: Line2D([], [], color="0.4", marker="o", mfc=face, ms=5, lw=1)
        for part, face in (("validation", "white"), ("test", "0.4"))
    }
    best = found.row(found.best)
    if best is not None:
        reference = panels[0].axvline(100 * best.test.estimate, color="0.4", ls=":", zorder=1.5)
        handles["best parent, test"] = reference
    names = [line if isinstance(line, str) else line.name for line in lines]
    panels[0].set_yticks(range(len(lines)), names)
    for line, label in zip(lines, panels[0].get_yticklabels(), strict=True):
        label.set(fontweight="bold" if isinstance(line, str) else "normal")
    panels[0].set_ylim(len(lines) - 0.5, -0.5)
    panels[0].set_xlabel("accuracy [%]")
    if tested:
        panels[1].axvline(0, color="0.4", linestyle=":", zorder=1.5)
        panels[1].set_xlabel("test accuracy, to the best parent's [points]")
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        for y, line in enumerate(lines):
            if isinstance(line, str) and y:
                axes.axhline(y - 0.5, color="0.85", lw=0.8, zorder=0.5)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles)
    )
    return figure


@_styled
def plot_front(front: Mapping[str, Any]) -> Figure:
    """The compromises between tasks, for each pair of tasks, and where everybody else stands.

    Args:
        front: the entry `front` of `results.json`; see `megajax.report.front`.

    Returns:
        The figure; of more than four tasks the first four.
    """
    tasks = list(front["tasks"])[:4]
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    columns = min(len(pairs), 3)
    rows = -(-len(pairs) // columns)
    size = (max(3.2 * columns, 6), 0.7 + 3.3 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    points = np.asarray(front["points"], float).reshape(-1, len(front["tasks"]))
    for axes, (first, second) in zip(panels, pairs, strict=True):
        shown = points[np.argsort(points[:, first])]
        style = {"color": _MERGED, "alpha": 0.6, "lw": 1, "label": "front"}
        axes.plot(shown[:, first], shown[:, second], "o-", ms=4, mfc="white", **style)
        for key, scores in front["networks"].items():
            look = _look(key)
            big = {"merged": 12, "ensemble": 7}.get(key, 6)
            at = (scores[first], scores[second])
            order = 3 if key == "merged" else 4  # it may be one of the others
            style = {"color": look.color, "ms": big, "zorder": order}
            axes.plot(*at, look.marker, label=name_of(key), ls="", **style)
            if look.marker == ".":  # they share a look
                axes.annotate(name_of(key), at, (4, 3), textcoords="offset points", fontsize=7)
        axes.set_xlabel(tasks[first])
        axes.set_ylabel(tasks[second])
        axes.margins(0.1)
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() != "."]
    known = {str(line.get_label()): line for line in lines}
    figure.legend(list(known.values()), list(known), loc="outside upper center", ncols=5)
    return figure


@_styled
def plot_mask(shares: Mapping[str, npt.ArrayLike]) -> Figure:
    """Where the merged network comes from: the share of the parents in every channel of each layer.

    Args:
        shares: layer name -> coefficients `[channels, K]`, or their means `[K]`. A layer's channels
            have no order of their own and are sorted by share.

    Returns:
        The figure, first layer on top; of two parents one panel, else one for each parent.
    """
    tables = {name: np.atleast_2d(np.asarray(rows, float)) for name, rows in shares.items()}
    count = next(iter(tables.values())).shape[1]
    shown = [1] if count == 2 else list(range(count))
    panel_width = 4.4 if count == 2 else max(1.3, 6 / count)
    labelled = range(0, len(tables), -(-len(tables) // _MANY_LAYERS))
    height = 1.3 + 0.2 * min(len(tables), _MANY_LAYERS)
    figure = Figure(figsize=(1.8 + panel_width * len(shown), height), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    between = (_PARENTS[0], "#f4f4f4", _PARENTS[1]) if count == 2 else ("#ffffff", _MERGED)
    colours = LinearSegmentedColormap.from_list("shares", between)
    for axes, k in zip(panels, shown, strict=True):
        for y, table in enumerate(tables.values()):
            values = np.sort(table[:, k])[None, :]
            extent = (0, 100, y + 0.46, y - 0.46)
            image = axes.imshow(values, cmap=colours, vmin=0, vmax=1, extent=extent)
            if count == 2 and y in labelled:
                axes.text(102, y, f"{values.mean():.2f}", va="center", fontsize=7, color="0.3")
        axes.set_xlim(0, 100)
        axes.set_ylim(len(tables) - 0.5, -0.5)
        names = [list(tables)[y] for y in labelled]
        axes.set_yticks(labelled, names, fontsize=7 if len(tables) > 12 else 8)
        axes.set_xlabel("channels [%]" if count > 2 else "channels of the layer, sorted [%]")
        axes.grid(False)
        if count > 2:
            axes.set_title(f"parent {k}", fontsize=9)
        for spine in axes.spines.values():
            spine.set_visible(False)
    if count == 2:
        panels[0].text(102, -0.75, "mean", fontsize=7, color="0.3")
    which = "parent 1" if count == 2 else "the parent"
    bar = figure.colorbar(
        image, ax=panels, location="right", shrink=min(1.0, 3 / len(tables) + 0.5)
    )
    bar.set_label(f"share of {which}")
    return figure


@_styled
def plot_path(path: Mapping[str, Any]) -> Figure:
    """Accuracy and loss on the straight line between two parents, and the merged network's place.

    Args:
        path: the entry `path` of `results.json`.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name, label, unit in (
        (panels[0], "accuracy", "accuracy on validation data [%]", 100),
        (panels[1], "nll", "cross-entropy on validation data [nats]", 1),
    ):
        looks = zip(path["lines"].items(), _LINES, "osD^", strict=False)
        for (line, points), colour, marker in looks:
            values = [np.nan if point[name] is None else unit * point[name] for point in points]
            panel.plot(path["shares"], values, color=colour, marker=marker, ms=4, label=line)
        merged = path["merged"]
        if merged[name] is not None:
            star = {"color": _MERGED, "ms": 13, "clip_on": False, "zorder": 4}
            panel.plot(merged["share"], unit * merged[name], "*", label="merged", **star)
        panel.set_xlabel("share of parent 1 in the weights")
        panel.set_ylabel(label)
        panel.margins(x=0.03)
    panels[0].set_ylim(bottom=0)
    for panel in panels:
        panel.margins(y=0.08)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return figure


@_styled
def plot_per_class(
    accuracies: Mapping[str, Sequence[float | None]], classes: Sequence[str] | None = None
) -> Figure:
    """Test accuracy for each class; with many classes, sorted by the merged network's.

    Args:
        accuracies: name of a network -> one accuracy for each class; null where a class has no
            test image.
        classes: their names; None numbers them.

    Returns:
        The figure.
    """
    values = {key: _percent(row) for key, row in accuracies.items()}
    count = len(next(iter(values.values())))
    many = count > _MANY_CLASSES
    order = np.argsort(values.get("merged", np.arange(count))) if many else np.arange(count)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    offsets = np.linspace(-0.25, 0.25, len(values)) if not many else np.zeros(len(values))
    for (key, row), offset in zip(values.items(), offsets, strict=True):
        look = _look(key)
        size = {"merged": 11.0, "ensemble": 5.0}.get(key, 6.0) * (0.4 if many else 1)
        label, height = key.replace("_", " "), 4 if key == "merged" else 3
        style: Any = {"color": look.color, "ms": size, "zorder": height, "label": label}
        axes.plot(np.arange(count) + offset, row[order], look.marker, **style)
    if many:
        axes.set_xlabel(f"{count} classes, sorted by the merged network's accuracy")
    else:
        names = list(classes) if classes else [str(c) for c in range(count)]
        slanted = sum(map(len, names)) > _MANY_LETTERS
        axes.set_xticks(range(count), names, rotation=40 if slanted else 0)
        axes.set_xlabel("class")
        axes.grid(axis="x", visible=False)
        for c in range(0, count, 2):
            axes.axvspan(c - 0.5, c + 0.5, color="0.965", zorder=0, lw=0)
        axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylabel("test accuracy [%]")
    axes.set_ylim(min(-2.0, np.nanmin(np.stack(list(values.values()))) - 2), 103)
    figure.legend(loc="outside upper center", ncols=min(len(values), 6))
    return figure


@_styled
def plot_robustness(
    robustness: Mapping[str, Any], clean: Mapping[str, float], *, keys: Sequence[str]
) -> Figure:
    """Accuracy against severity: the mean over the corruptions, then each of them.

    Args:
        robustness: the entry `robustness` of `results.json`.
        clean: name of a network -> test accuracy, drawn at severity 0.
        keys: names of the networks to draw.

    Returns:
        The figure.
    """
    networks = {key: robustness["networks"][key]["accuracy"] for key in keys}
    names = list(next(iter(networks.values())))
    panels_of = ["mean", *names] if len(names) > 1 else names
    columns = min(3, len(panels_of))
    lines = -(-len(panels_of) // columns)
    figure = Figure(figsize=(10, 0.6 + 1.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    severities = [0, *robustness["severities"]]
    for axes, name in zip(panels.flat, panels_of, strict=False):
        for key, accuracy in networks.items():
            look, label = _look(key)._asdict(), key.replace("_", " ")
            rows = list(accuracy.values()) if name == "mean" else [accuracy[name]]
            values = np.mean(np.asarray(rows, float), axis=0)
            size = 7 if key == "merged" else 3.5
            heights = 100 * np.array([clean[key], *values])
            axes.plot(severities, heights, ms=size, lw=1.3, label=label, **look)
        title = "mean over corruptions" if name == "mean" else name.replace("_", " ")
        axes.set_title(title, fontsize=9, fontweight="bold" if name == "mean" else "normal")
        axes.set_xticks(severities)
    for axes in panels.flat[len(panels_of) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy [%]")
    for axes in panels.flat[len(panels_of) - columns : len(panels_of)]:  # lowest of each column
        axes.set_xlabel("severity (0: as it is)")
        axes.tick_params(labelbottom=True)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6))
    return figure


def _percent(row: Sequence[float | None]) -> npt.NDArray[np.float64]:
    return 100 * np.array([np.nan if value is None else value for value in row], np.float64)


def _whisker(axes: Axes, limits: npt.NDArray[Any], y: float, colour: str, *, filled: bool) -> None:
    """A point with its interval (estimate, low, high)."""
    estimate, low, high = limits
    if np.isfinite(low):
        axes.plot([low, high], [y, y], color=colour, lw=1.2 if filled else 0.8)
    face = colour if filled else "white"
    axes.plot(estimate, y, "o", color=colour, mfc=face, ms=5, zorder=3)
