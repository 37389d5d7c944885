"""What a run shows people: table, `report.md` and plots, all made from the results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megajax.errors import WorkdirError
from megajax.workdir import write_text

__all__ = ["answer", "plot_fitness", "plot_mask", "plot_path", "rows", "write_report"]

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_COLUMNS = ("network", "validation accuracy", "test accuracy", "test NLL [nats]")


def rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of a run: parents, baselines, merged network.

    Args:
        results: the content of `results.json`.

    Returns:
        Rows of strings; the first one is the header.

    Example:
        >>> figures = {"validation_accuracy": 0.9, "test_accuracy": 0.8, "test_nll": 0.5}
        >>> rows({"parents": [figures], "baselines": {}, "merged": figures})[1]
        ('parent 0', '90.0 %', '80.0 %', '0.500')
    """
    entries = [(f"parent {k}", parent) for k, parent in enumerate(results["parents"])]
    entries += [(name.replace("_", " "), entry) for name, entry in results["baselines"].items()]
    entries += [("merged", results["merged"])]
    return [
        _COLUMNS,
        *(
            (
                name,
                f"{100 * entry['validation_accuracy']:.1f} %",
                f"{100 * entry['test_accuracy']:.1f} %",
                f"{entry['test_nll']:.3f}",
            )
            for name, entry in entries
        ),
    ]


def answer(results: Mapping[str, Any]) -> str:
    """The run in one sentence: merged against the best parent, which validation chose.

    Args:
        results: the content of `results.json`.

    Returns:
        The sentence.

    Example:
        >>> parent = {"validation_accuracy": 0.9, "test_accuracy": 0.80}
        >>> merged = {"validation_accuracy": 0.9, "test_accuracy": 0.82}
        >>> answer({"parents": [parent], "merged": merged, "data": {"test": 100}})
        'Test accuracy on 100 held-out images: merged 82.0 %, best parent (number 0, chosen on
        validation) 80.0 %, difference +2.0 points.'
    """
    validation = [parent["validation_accuracy"] for parent in results["parents"]]
    best = int(np.argmax(validation))
    ours = 100 * results["merged"]["test_accuracy"]
    theirs = 100 * results["parents"][best]["test_accuracy"]
    return (
        f"Test accuracy on {results['data']['test']:,} held-out images: merged {ours:.1f} %, best "
        f"parent (number {best}, chosen on validation) {theirs:.1f} %, difference "
        f"{ours - theirs:+.1f} points."
    )


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    shares: Mapping[str, Sequence[float]],
) -> None:
    """Writes `report.md` and `plots/*.png` into a workdir.

    Args:
        folder: the workdir.
        results: the content of `results.json`.
        history: the lines of `metrics.jsonl`.
        shares: for each layer, the share of each parent in the merged network.

    Raises:
        WorkdirError: a file cannot be written.
    """
    plots = folder / "plots"
    try:
        plots.mkdir(exist_ok=True)
        for name, figure in (
            ("fitness", plot_fitness(history)),
            ("mask", plot_mask(shares)),
            ("path", plot_path(results["path"])),
        ):
            figure.savefig(plots / f"{name}.png", dpi=150)
    except OSError as error:
        raise WorkdirError(f"{plots} cannot be written: {error.strerror}") from None
    header, *body = rows(results)
    table = [" | ".join(row) for row in (header, ["---"] * len(header), *body)]
    data, seconds = results["data"], results["seconds"]
    write_text(
        folder / "report.md",
        "\n".join(
            [
                f"# {answer(results)}",
                "",
                *(f"| {line} |" for line in table),
                "",
                f"Data: {data['name']}; {data['train']:,} training, {data['validation']:,} "
                f"validation and {data['test']:,} test images, disjoint. The search saw validation "
                "images only; the test images were looked at once, after it.",
                "",
                f"Seed {results['seed']}; {results['generations']} generations, "
                f"{results['evaluations']:,} networks scored on the validation images. Training "
                f"the parents took {seconds['parents']:.0f} s, the search "
                f"{seconds['search']:.0f} s.",
                "",
                "![fitness over generations](plots/fitness.png)",
                "",
                "![share of each parent by layer](plots/mask.png)",
                "",
                "![line between two parents](plots/path.png)",
                "",
            ]
        ),
    )


def plot_fitness(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Fitness over generations: best ever, median, and the range from worst to best.

    Args:
        history: the lines of `metrics.jsonl`.

    Returns:
        The figure.
    """
    of = {
        name: np.array([np.nan if row[name] is None else row[name] for row in history])
        for name in ("generation", "best_ever", "median", "best", "worst")
    }
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    x = of["generation"]
    axes.fill_between(x, of["worst"], of["best"], color=_COLOURS[0], alpha=0.2, label="population")
    axes.plot(x, of["median"], color=_COLOURS[0], label="median")
    axes.plot(x, of["best_ever"], color=_COLOURS[5], label="best so far")
    start = of["best_ever"][0]
    axes.axhline(start, color="0.4", linestyle=":", label="best of the first population")
    # The random individuals of the first generations would squeeze the rest of the picture.
    low = np.nanmin(of["median"][len(x) // 5 :], initial=start)
    high = np.nanmax(of["best_ever"])
    margin = 0.1 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("generation")
    axes.set_ylabel("fitness on validation data")
    axes.legend(frameon=False, loc="center right")
    return figure


def plot_mask(shares: Mapping[str, Sequence[float]]) -> Figure:
    """The share of each parent in each layer of the merged network, first layer on top.

    Args:
        shares: layer name -> mean coefficient of each parent.

    Returns:
        The figure.
    """
    names = list(shares)
    values = np.array([shares[name] for name in names])
    figure = Figure(figsize=(6, 1.6 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(names))
    for k, column in enumerate(values.T):
        colour = _COLOURS[k % len(_COLOURS)]
        axes.barh(names, column, left=left, color=colour, label=f"parent {k}", height=0.8)
        left += column
    axes.invert_yaxis()
    axes.margins(0)
    axes.set_xlabel("mean share in the merged network")
    figure.legend(frameon=False, loc="outside upper center", ncols=values.shape[1])
    return figure


def plot_path(path: Mapping[str, Any]) -> Figure:
    """Accuracy and loss on the straight line between two parents, and the merged network's place.

    Args:
        path: the entry `path` of `results.json`.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    labels = {"accuracy": "accuracy on validation data", "nll": "cross-entropy [nats]"}
    for panel, (name, label) in zip(axes, labels.items(), strict=True):
        for (line, points), marker in zip(path["lines"].items(), "osD", strict=False):
            colour = _COLOURS[list(path["lines"]).index(line)]
            values = [np.nan if point[name] is None else point[name] for point in points]
            panel.plot(path["shares"], values, color=colour, marker=marker, ms=4, label=line)
        merged = path["merged"]
        panel.plot(merged["share"], merged[name], "*", color=_COLOURS[5], ms=14, label="merged")
        panel.set_xlabel("share of parent 1")
        panel.set_ylabel(label)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside upper center", ncols=len(names))
    return figure
