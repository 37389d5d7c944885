"""Puts finished runs side by side, with tests of their differences.

    python -m megajax.compare runs/digits-seed0 runs/wide-seed0
    python -m megajax.compare runs/digits runs/wide --out comparison

A RUN is a workdir, or a folder whose subfolders are the workdirs of its seeds. The merged networks
are tested against the first run's: image by image where two workdirs share their test images, and
by seed where they have seeds in common. Nothing is written unless --out names a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from megajax.errors import ConfigError, DataError, MegajaxError, WorkdirError
from megajax.evaluation.predictions import (
    Predictions,
    by_id,
    correct,
    load_predictions,
    same_examples,
)
from megajax.evaluation.results import aggregate, comparison
from megajax.evaluation.statistics import Difference, Interval, holm, mcnemar, paired_t
from megajax.io import flatten, read_json, write_json, write_text
from megajax.report.page import Block, Heading, Paragraph, Table, show, to_markdown
from megajax.report.text import caveats, p_value, percent, points, with_interval

__all__ = ["Run", "against_first", "load_run", "main", "page", "settings", "summary"]

RESULTS = "results.json"


class Run(NamedTuple):
    """One argument of the command: a run, or the seeds of one.

    Attributes:
        name: the folder as it was given.
        results: for each seed the content of its `results.json`.
        predictions: for each seed its predictions, or None.
        configs: for each seed its resolved configuration, flat: `section.field` -> value.
    """

    name: str
    results: tuple[Mapping[str, Any], ...]
    predictions: tuple[Predictions | None, ...]
    configs: tuple[Mapping[str, Any], ...]


def load_run(folder: Path) -> Run:
    """Reads a workdir, or all workdirs in a folder.

    Raises:
        WorkdirError: there is no finished run, or a file is damaged.

    Example:
        >>> load_run(Path("nowhere"))
        Traceback (most recent call last):
        ...
        megajax.errors.WorkdirError: nowhere is not a folder
    """
    if not folder.is_dir():
        raise WorkdirError(f"{folder} is not a folder")
    folders = [folder] if _is_workdir(folder) else sorted(filter(_is_workdir, folder.iterdir()))
    if not folders:
        raise WorkdirError(f"{folder} holds no finished run: there is no {RESULTS} of one")
    results = [read_json(inner / RESULTS) for inner in folders]
    for inner, found in zip(folders, results, strict=True):
        _check(inner / RESULTS, found)
    order = np.argsort([found["seed"] for found in results], kind="stable")
    return Run(
        str(folder),
        tuple(results[i] for i in order),
        tuple(load_predictions(folders[i]) for i in order),
        tuple(_config(folders[i]) for i in order),
    )


def against_first(runs: Sequence[Run]) -> list[tuple[Difference | None, str]]:
    """Tests the merged network of every run but the first against the first one's.

    Returns:
        For each of them the difference of the test accuracies, and over what it was tested; or
        None, and why it was not.
    """
    return [_paired(runs[0], run) for run in runs[1:]]


def settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The fields of the configuration in which runs differ, with their value in each run."""
    configs = [_without_seed(run) for run in runs]
    names = sorted(set().union(*configs))
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def summary(run: Run) -> dict[str, Any]:
    """A run's figures, as plain data; the difference is to its own best parent.

    Raises:
        DataError: its seeds do not belong together.
    """
    single = len(run.results) == 1
    results = run.results[0] if single else aggregate(run.results)
    found = comparison(results, run.predictions[0] if single else None)
    rows = {row.key: row for row in found.rows}
    best, merged, ensemble = rows[found.best], rows["merged"], rows.get("ensemble")
    return {
        "run": run.name,
        "seeds": [one["seed"] for one in run.results],
        "data": results["data"]["name"],
        "caveats": caveats(found, results),
        "best_parent": best.test._asdict(),
        "merged": merged.test._asdict(),
        "gain": merged.test.estimate - best.test.estimate,
        "difference": None if merged.difference is None else merged.difference._asdict(),
        "ensemble": None if ensemble is None else ensemble.test.estimate,
        "evaluations": merged.evaluations,
    }


def page(runs: Sequence[Run]) -> list[Block]:
    """The comparison as a page: a table with a column for each run, and what is to be said to it.

    Raises:
        DataError: the seeds of a run do not belong together.
    """
    summaries, tested = [summary(run) for run in runs], against_first(runs)
    p_values = holm([np.nan if found is None else found.p_value for found, _ in tested])
    names = [run.name for run in runs]
    lines = [
        ("data", *(one["data"] for one in summaries)),
        ("seeds", *(", ".join(map(str, one["seeds"])) for one in summaries)),
        ("best parent", *(percent(one["best_parent"]["estimate"]) for one in summaries)),
        ("merged", *(with_interval(Interval(**one["merged"])) for one in summaries)),
        ("ensemble", *(percent(one["ensemble"]) for one in summaries)),
        ("to best parent [points]", *map(_gain, summaries)),
        ("p", *(p_value((one["difference"] or {}).get("p_value"), "") for one in summaries)),
        ("networks scored", *(_count(one["evaluations"]) for one in summaries)),
        ("to the first merged [points]", "", *(points(found) for found, _ in tested)),
        ("p (Holm)", "", *(p_value(p, "") for p in p_values)),
        ("pairs", "", *("" if found is None else over for found, over in tested)),
    ]
    lines = [line for line in lines if any(line[1:])]
    blocks: list[Block] = [
        Heading("Test accuracy of runs side by side"),
        Table([("", *names), *lines], strong=("merged",)),
    ]
    blocks += [
        Paragraph(f"{names[0]} and {name} are not tested against each other: {why}.")
        for name, (found, why) in zip(names[1:], tested, strict=True)
        if found is None
    ]
    blocks += [
        Paragraph(f"{one['run']}: {line}", strong=True)
        for one in summaries
        for line in one["caveats"]
    ]
    different = settings(runs)
    if different:
        fields = [(name, *map(str, values)) for name, values in different.items()]
        blocks += [Heading("What differs in the configuration"), Table([("", *names), *fields])]
    return blocks


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m megajax.compare RUN RUN ... [--out DIR]`.

    Args:
        arguments: the words after the module's name; None takes the command line's.

    Returns:
        The exit code: 0, or 2 after one line on the standard error that names what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megajax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", type=Path, help="a workdir, or a folder of workdirs"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="write comparison.md and comparison.json to this folder",
    )
    options = parser.parse_args(arguments)
    try:
        if len(options.runs) < 2:
            raise ConfigError("at least two runs must be named to be compared; see --help")
        runs = [load_run(folder) for folder in options.runs]
        blocks = page(runs)
        if options.out is not None:
            write_text(options.out / "comparison.md", to_markdown(blocks))
            write_json(options.out / "comparison.json", _plain(runs))
    except MegajaxError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return 2
    show(blocks, Console(), whole=True)
    return 0


def _gain(run: Mapping[str, Any]) -> str:
    difference = run["difference"]
    if difference is None:
        return f"{100 * run['gain']:+.1f}"
    return points(Difference(**difference))


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _paired(first: Run, run: Run) -> tuple[Difference | None, str]:
    data = [one.results[0]["data"]["name"] for one in (first, run)]
    if data[0] != data[1]:
        return None, f"one is about {data[0]}, the other about {data[1]}"
    if len(first.results) == len(run.results) == 1:
        theirs, ours = first.predictions[0], run.predictions[0]
        if theirs is None or ours is None:
            return None, f"{(first if theirs is None else run).name} stored no predictions"
        ours, theirs = by_id(ours), by_id(theirs)
        if not same_examples(ours, theirs):
            return None, "the test images are not the same, and there is one seed of each"
        difference = mcnemar(correct(ours, "merged"), correct(theirs, "merged"))
        return difference, f"{len(ours.labels):,} images"
    by_seed = [
        {one["seed"]: one["merged"]["test_accuracy"] for one in side.results}
        for side in (run, first)
    ]
    shared = [seed for seed in by_seed[0] if seed in by_seed[1]]
    if len(shared) < 2:
        return None, "fewer than two seeds are in both"
    ours_by_seed, theirs_by_seed = ([side[seed] for seed in shared] for side in by_seed)
    return paired_t(ours_by_seed, theirs_by_seed), f"{len(shared)} seeds"


def _is_workdir(folder: Path) -> bool:
    """Whether this is a finished run; a folder of seeds may hold figures over them all."""
    path = folder / RESULTS
    if not path.is_file():
        return False
    found = read_json(path)
    return not (isinstance(found, Mapping) and "seeds" in found)


def _check(path: Path, results: Any) -> None:
    """Finds out at once whether the figures that are needed are there."""
    try:
        comparison(results)
        _ = results["seed"], results["data"]["name"]
    except (KeyError, TypeError, IndexError, AttributeError, DataError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise WorkdirError(f"{path} is not a result of a run: {missing}") from None


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    stored = read_json(path) if path.is_file() else {}
    return flatten(stored.get("config", {}))


def _without_seed(run: Run) -> dict[str, Any]:
    """A run's configuration; of several seeds the first one's, whose seed says nothing."""
    return {k: v for k, v in run.configs[0].items() if k != "seed" or len(run.configs) == 1}


def _plain(runs: Sequence[Run]) -> dict[str, Any]:
    tested = against_first(runs)
    return {
        "runs": [summary(run) for run in runs],
        "against_first": [
            {"run": run.name, "over": over, **(found._asdict() if found is not None else {})}
            for run, (found, over) in zip(runs[1:], tested, strict=True)
        ],
        "settings": settings(runs),
    }
