"""What a run shows people: one sentence, tables, a page in Markdown and in HTML, and plots.

All of it is made from plain data: `results.json` (`megajax.evaluation.results` says what it holds), the lines
of `metrics.jsonl`, `predictions.npz` and the shares of the parents in each layer. What a run did
not measure is left out. The same functions serve many seeds that `megajax.evaluation.results.aggregate` has
put together.

    text    sentence and tables             plots   figures
    page    blocks -> Markdown, HTML        (here)  which blocks there are, and the files
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from matplotlib.figure import Figure

from megajax.evaluation.predictions import Predictions
from megajax.evaluation.results import Comparison, comparison, entries, is_aggregate
from megajax.io import write_bytes, write_text
from megajax.report import plots, text
from megajax.report.page import Block, Heading, Paragraph, Picture, Table, to_html, to_markdown

__all__ = ["NOT_HELD_OUT", "answer", "rows", "write_report"]

NOT_HELD_OUT = "Selected on the test set: the figures are not held out."

_CAPTIONS = {
    "accuracy": "Accuracy on validation (open) and test (filled) images, and the difference to the "
    "best parent on the test images; bars are 95 % intervals.",
    "per_class": "Test accuracy by class.",
    "robustness": "Accuracy on corrupted test images by severity.",
    "fitness": "Fitness of the population over the generations.",
    "mask": "Share of the parents in every channel of the merged network, layer by layer.",
    "path": "The straight line between parents 0 and 1 on validation images; the star is the "
    "merged network at its mean share.",
}

_FITNESS = {
    "cross_entropy": "negative cross-entropy [nats]",
    "accuracy": "accuracy",
}


def answer(results: Mapping[str, Any], predictions: Predictions | None = None) -> str:
    """The result in one sentence: merged against the best parent, which validation chose.

    Args:
        results: the content of `results.json`, or of many seeds (`megajax.evaluation.results.aggregate`).
        predictions: of a run, for the interval of the difference and its test.

    Returns:
        The sentence.

    Example:
        >>> parent = {"validation_accuracy": 0.9, "test_accuracy": 0.80}
        >>> merged = {"validation_accuracy": 0.9, "test_accuracy": 0.82}
        >>> answer({"parents": [parent], "merged": merged,
        ...         "data": {"validation": 50, "test": 100}})
        'Test accuracy on 100 held-out images: merged 82.0 % against 80.0 % for the best parent
        (number 0, chosen on validation), +2.0 points.'
    """
    return text.sentence(comparison(results, predictions))


def rows(
    results: Mapping[str, Any], predictions: Predictions | None = None
) -> list[tuple[str, ...]]:
    """The table of all methods, as wide as a terminal.

    Args:
        results: as for `answer`.
        predictions: as for `answer`.

    Returns:
        Rows of strings; the first one is the header. What nobody has is no column.

    Example:
        >>> figures = {"validation_accuracy": 0.9, "test_accuracy": 0.8}
        >>> rows({"parents": [figures], "merged": figures,
        ...       "data": {"validation": 50, "test": 100}})[2]
        ('merged', '90.0 %', '80.0 %')
    """
    return text.table(comparison(results, predictions))


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
        yield "fitness", plots.plot_fitness(history, _FITNESS.get(results.get("metric", ""), ""))
    if shares:
        yield "mask", plots.plot_mask(shares)
    if results.get("path"):
        yield "path", plots.plot_path(results["path"])


def _entries(results: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return results["networks"] if is_aggregate(results) else entries(results)


def _blocks(results: Mapping[str, Any], found: Comparison, pictures: Sequence[str]) -> list[Block]:
    """The page: the answer first, then what it rests on."""

    def picture(name: str) -> list[Block]:
        return [Picture(name, _CAPTIONS[name])] if name in pictures else []

    strong = ("merged",)
    blocks: list[Block] = [Heading(f"Merged networks on {results['data']['name']}")]
    if not found.held_out:
        blocks.append(Paragraph(NOT_HELD_OUT, strong=True))
    blocks.append(Paragraph(text.sentence(found), strong=True))
    robustness = results.get("robustness")
    robust = text.robust_sentence(found, robustness) if robustness else None
    if robust is not None:
        blocks.append(Paragraph(robust))
    blocks += [Heading("All methods"), Table(text.table(found, full=True), strong)]
    searched = text.budgets(found)
    if searched is not None:
        blocks.append(Paragraph(searched))
    blocks += [Paragraph(note) for note in text.notes(found)]
    blocks += picture("accuracy") + picture("per_class")
    agreement = text.agreement_table(found, _entries(results))
    if agreement:
        blocks += [
            Heading("Agreement"),
            Paragraph("Share of the test images for which a network predicts the parent's class."),
            Table(agreement, strong),
        ]
    if robustness:
        blocks += [
            Heading("Corrupted images"),
            Table(text.robust_table(found, robustness), strong),
            Paragraph(_about_corruptions(robustness)),
            *picture("robustness"),
        ]
    if {"fitness", "mask", "path"} & set(pictures):
        blocks += [Heading("The search"), *picture("fitness"), *picture("mask"), *picture("path")]
    return [*blocks, Heading("What was run"), *(Paragraph(line) for line in _about_run(results))]


def _about_corruptions(robustness: Mapping[str, Any]) -> str:
    if robustness.get("published"):
        source = f"CIFAR-10-C as published, {robustness['examples']:,} images of each kind"
    else:
        source = (
            f"{robustness['examples']:,} test images, corrupted with the constants of CIFAR-10-C "
            "(Hendrycks and Dietterich, 2019); lengths in pixels, made for 32 pixels a side"
        )
    severities = ", ".join(map(str, robustness["severities"]))
    return f"{source}. Means over severities {severities}."


def _about_run(results: Mapping[str, Any]) -> Iterator[str]:
    data = results["data"]
    sizes = f"{data['name']}: "
    if "train" in data:
        sizes += f"{data['train']:,} training, "
    sizes += f"{data['validation']:,} validation and {data['test']:,} test images, disjoint."
    if results.get("not_held_out"):
        yield sizes
    else:
        yield (
            f"{sizes} The search saw validation images only; the test images were looked at once, "
            "after it."
        )
    run = [f"Seeds {', '.join(map(str, results['seeds']))}"] if is_aggregate(results) else []
    run += [f"Seed {results['seed']}"] if "seed" in results else []
    if "generations" in results:
        run.append(f"{results['generations']:,} generations")
    merged = results["networks"]["merged"] if is_aggregate(results) else results
    if merged.get("evaluations") is not None:
        run.append(f"{merged['evaluations']:,} networks scored in the search")
    if run:
        yield "; ".join(run) + "."
    seconds = results.get("seconds")
    if seconds:
        yield (
            "Seconds: "
            + ", ".join(f"{stage} {taken:.0f}" for stage, taken in seconds.items())
            + "."
        )
