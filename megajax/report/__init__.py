"""What a run shows people: sentences, tables, a page in Markdown and in HTML, and plots.

All of it is made from plain data: `results.json` (`megajax.evaluation.results` says what it holds),
the lines of `metrics.jsonl`, `predictions.npz` and the shares of the parents in each layer. What a
run did not measure is left out. The same functions serve many seeds that
`megajax.evaluation.results.aggregate` has put together.

    text    sentences and tables                    plots   figures
    page    blocks -> Markdown, HTML, terminal      (here)  which blocks there are, and the files
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from megajax.evaluation.batches import Batches
from megajax.evaluation.measures import predict
from megajax.evaluation.predictions import Predictions
from megajax.evaluation.results import Comparison, comparison, entries, is_aggregate
from megajax.io import write_bytes, write_text
from megajax.merging.merge import MergeResult
from megajax.merging.metrics import Metric
from megajax.merging.outputs import ensemble
from megajax.merging.problem import scores_of
from megajax.report import plots, text
from megajax.report.page import Block, Heading, Paragraph, Picture, Table, to_html, to_markdown
from megajax.types import ApplyFn, PyTree

__all__ = ["answer", "front", "summary", "write_report"]

_CAPTIONS = {
    "accuracy": "Accuracy on validation (open) and test images (filled), and the difference to the "
    "best parent on the test images; bars are 95 % intervals.",
    "per_class": "Test accuracy by class.",
    "robustness": "Accuracy on corrupted test images by severity.",
    "fitness": "Fitness of the population over the generations, and of the parents as they were.",
    "mask": "Share of the parents in every channel of the merged network, layer by layer from the "
    "input (top) to the output.",
    "path": "The straight line between parents 0 and 1 on validation images; the star is the "
    "merged network at its mean share.",
    "front": "Compromises between the tasks that the search found, none of them better than "
    "another on all tasks; up and right is better.",
}

_PUBLISHED = "CIFAR-10-C as published, {:,} images of each kind"
_CORRUPTED = (
    "{:,} test images, corrupted with the constants of CIFAR-10-C (Hendrycks and Dietterich, "
    "2019); lengths in pixels, made for 32 pixels a side"
)
_TASKS = "What the search was scored on: examples that no parent was trained on."
_HELD_OUT = (
    "The same on test examples, which the search never saw, and the difference to the parent that "
    "the search found best: 95 % intervals of a paired bootstrap."
)
_AGREEMENT = "Share of the test images for which a network predicts the parent's class."
_STRONG = ("merged",)
_OF_SEARCH = ("fitness", "mask", "front", "path")
_WIDE = ("accuracy", "per_class", "robustness", "path")
_FITNESS = {"cross_entropy": "negative cross-entropy [nats]", "accuracy": "accuracy"}


def answer(results: Mapping[str, Any], predictions: Predictions | None = None) -> str:
    """The result in sentences: merged against the best parent, and against its other rivals.

    Args:
        results: the content of `results.json`, or of many seeds.
        predictions: of a run, for the intervals of the differences and their tests.

    Returns:
        The sentences; what a reader must know before (`megajax.report.text.caveats`) is not there.

    Example:
        >>> parent = {"validation_accuracy": 0.9, "test_accuracy": 0.80}
        >>> merged = {"validation_accuracy": 0.9, "test_accuracy": 0.82}
        >>> answer({"parents": [parent], "merged": merged,
        ...         "data": {"validation": 50, "test": 100}})
        'Test accuracy on 100 held-out images: merged 82.0 % against 80.0 % for the best parent
        (number 0, chosen on validation), +2.0 points.'
    """
    return " ".join(text.headline(comparison(results, predictions)))


def summary(results: Mapping[str, Any], predictions: Predictions | None = None) -> list[Block]:
    """What a terminal shows of a run, for `megajax.report.page.show`: table, caveats and answer.

    Args:
        results: as for `answer`.
        predictions: as for `answer`.

    Example:
        >>> figures = {"validation_accuracy": 0.9, "test_accuracy": 0.8}
        >>> table, answer = summary({"parents": [figures], "merged": figures,
        ...                          "data": {"validation": 50, "test": 100}})
        >>> table.rows[-1]
        ('merged', '80.0 %', '90.0 %')
    """
    found = comparison(results, predictions)
    return [
        Table(text.table(found), _STRONG),
        *(Paragraph(line, strong=True) for line in text.caveats(found, results)),
        *map(Paragraph, text.headline(found)),
    ]


def front(
    found: MergeResult, networks: Mapping[str, PyTree] | None = None
) -> dict[str, Any] | None:
    """The entry `front` of `results.json`: the compromises that a search found, and the others.

    The parents are there as they were given and, where every task's metric says what is to be
    averaged, their ensemble (see `megajax.ensemble`).

    Args:
        found: of a merge with `evolution.method="nsga2"`.
        networks: name -> variables of other networks to compare with, such as baselines'.

    Returns:
        Plain data, for `megajax.report.plots.plot_front` too; None if there is no front.
    """
    if found.front is None:
        return None
    tasks, problem = list(found.scores), found.problem
    of_parents = zip(*(found.parent_scores[task] for task in tasks), strict=True)
    scores = {f"parent_{k}": list(row) for k, row in enumerate(of_parents)}
    for name, variables in (networks or {}).items():
        scores[name] = scores_of(problem, variables)[1].tasks
    if all(metric.kind for metric in problem.metrics):
        rows = zip(problem.networks, problem.metrics, problem.batches, strict=True)
        scores["ensemble"] = [_of_ensemble(found.parents, *row) for row in rows]
    scores["merged"] = list(found.scores.values())
    return {
        "tasks": [f"{task}: {found.metrics[task].replace('_', ' ')}" for task in tasks],
        "points": np.asarray(found.front.scores, float).tolist(),
        "networks": {name: np.asarray(row, float).tolist() for name, row in scores.items()},
    }


def _of_ensemble(
    parents: Sequence[PyTree], apply_fn: ApplyFn, metric: Metric, batches: Batches
) -> float:
    """The score of the networks' mean prediction on one task."""
    data = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), batches)
    size = batches.valid.shape[1]
    outputs = [predict(apply_fn, parent, data.inputs, size) for parent in parents]
    mean = ensemble(jax.tree.map(lambda *leaves: np.stack(leaves), *outputs), metric)
    return float(metric.of(metric.statistics(mean, data.targets), data.valid))


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    shares: Mapping[str, npt.ArrayLike] | None = None,
    predictions: Predictions | None = None,
) -> None:
    """Writes `report.md`, `report.html` and `plots/` (PNG and PDF) into a workdir.

    Args:
        folder: the workdir.
        results: the content of `results.json`, or of many seeds.
        history: the lines of `metrics.jsonl`.
        shares: for each layer, the share of each parent in the merged network, `[K]` or for each
            channel `[channels, K]`.
        predictions: who was right where, for tests between two networks.

    Raises:
        WorkdirError: a file cannot be written.
    """
    found = comparison(results, predictions)
    figures = dict(_figures(results, found, history, shares or {}))
    blocks = _blocks(results, found, list(figures))
    for name, figure in figures.items():
        for kind in plots.FORMATS:
            write_bytes(folder / "plots" / f"{name}.{kind}", plots.rendered(figure, kind))
    pictures = {name: plots.rendered(figure, "svg") for name, figure in figures.items()}
    write_text(folder / "report.html", to_html(blocks, pictures))
    write_text(folder / "report.md", to_markdown(blocks))


def _figures(
    results: Mapping[str, Any],
    found: Comparison,
    history: Sequence[Mapping[str, Any]],
    shares: Mapping[str, npt.ArrayLike],
) -> Iterator[tuple[str, Figure]]:
    """The pictures that there is something to draw for, by name."""
    yield "accuracy", plots.plot_accuracy(found)
    of_all = _entries(results)
    shown = [key for key in of_all if key.startswith("parent_") or key in ("merged", "ensemble")]
    by_class = {
        key: of_all[key]["per_class_accuracy"]
        for key in shown
        if of_all[key].get("per_class_accuracy")
    }
    if by_class:
        yield "per_class", plots.plot_per_class(by_class, results["data"].get("classes"))
    robustness = results.get("robustness")
    if robustness:
        clean = {row.key: row.test.estimate for row in found.rows}
        keys = [key for key in shown if key in robustness["networks"]]
        yield "robustness", plots.plot_robustness(robustness, clean, keys=keys)
    if history:
        levels = [parent.get("fitness") for parent in results["parents"]]
        metric = _FITNESS.get(results.get("metric", ""), "")
        yield "fitness", plots.plot_fitness(history, metric, levels)
    if shares:
        yield "mask", plots.plot_mask(shares)
    if results.get("path"):
        yield "path", plots.plot_path(results["path"])
    if results.get("front"):
        yield "front", plots.plot_front(results["front"])


def _entries(results: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return results["networks"] if is_aggregate(results) else entries(results)


def _blocks(results: Mapping[str, Any], found: Comparison, pictures: Sequence[str]) -> list[Block]:
    """The page: the answer first, then what it rests on."""

    def shown(*names: str) -> list[Block]:
        return [Picture(name, _CAPTIONS[name], name in _WIDE) for name in names if name in pictures]

    def section(title: str, *tables: tuple[str, Sequence[Sequence[str]]]) -> list[Block]:
        blocks: list[Block] = []
        for what, rows in tables:
            blocks += [Paragraph(what), Table(rows, _STRONG)] if rows else []
        return [Heading(title), *blocks] if blocks else []

    first, *others = text.headline(found)
    robustness = results.get("robustness")
    robust = text.robust_sentence(found, robustness) if robustness else None
    tasks, tests = text.task_table(results), text.held_out_table(results)
    agreement = text.agreement_table(found, _entries(results))
    blocks: list[Block] = [
        Heading(f"Merged networks on {results['data']['name']}"),
        *(Paragraph(line, strong=True) for line in (*text.caveats(found, results), first)),
        *map(Paragraph, filter(None, [*others, robust])),
        Heading("All methods"),
        Table(text.table(found, full=True), _STRONG),
        *map(Paragraph, filter(None, [text.budgets(found), *text.notes(found)])),
        *shown("accuracy", "per_class"),
        *section("Tasks", (_TASKS, tasks), (_HELD_OUT, tests)),
        *section("Agreement", (_AGREEMENT, agreement)),
    ]
    if robustness:
        blocks += [
            Heading("Corrupted images"),
            Table(text.robust_table(found, robustness), _STRONG),
            Paragraph(_about_corruptions(robustness)),
            *shown("robustness"),
        ]
    search = shown(*_OF_SEARCH)
    blocks += [Heading("The search"), *search] if search else []
    return [*blocks, Heading("What was run"), Table(text.run_table(results))]


def _about_corruptions(robustness: Mapping[str, Any]) -> str:
    source = _PUBLISHED if robustness.get("published") else _CORRUPTED
    severities = robustness["severities"]
    which = "Means over severities" if len(severities) > 1 else "All at severity"
    images = source.format(robustness["examples"])
    return f"{images}. {which} {', '.join(map(str, severities))}."
