"""What `results.json` holds, and what it says: everybody against the best parent, and how sure.

Knows plain data alone: no network, no file, no picture. `comparison` reads one run, or many seeds
that `aggregate` has put together; the report and `megajax.report.compare` show what it finds.

`results.json` of a run, with the optional parts in brackets (what is missing is left out of the
report; `predictions.npz` beside it holds the arrays, see `megajax.evaluation.predictions`):

    parents      K entries
    baselines    name -> entry; an ensemble of the parents is called `ensemble`
    merged       entry
    seed, generations, evaluations (networks that the search scored on the validation images)
    data         name, train, validation, test (numbers of images) [, classes: their names]
    [seconds]    stage -> seconds
    [path]       shares, lines: name -> points {accuracy, nll}, merged: {share, accuracy, nll}
    [robustness] networks: name -> {mean_corruption_accuracy, accuracy: corruption -> [S]},
                 severities [S], examples [, published]
    [not_held_out] true where the search was scored on the test images

An entry is one network's figures: `validation_accuracy`, `test_accuracy`, `test_nll` (nats)
[, `validation_nll`, `fitness`, `calibration_error`, `per_class_accuracy` (one for each class),
`agreement` (with each parent), `evaluations` (networks that its own search scored),
`images_scored` (images that each of those was scored on, a mean if they differ; the validation
images if it is missing)].
Shares and accuracies lie in [0, 1]. In `predictions.npz` and in `robustness`, a network's name is
`parent_0`, ..., the name of a baseline, or `merged`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from megajax.errors import DataError
from megajax.evaluation.predictions import Predictions, correct
from megajax.evaluation.statistics import (
    Difference,
    Interval,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_t,
    proportion_interval,
)

__all__ = [
    "BEST",
    "Comparison",
    "Row",
    "aggregate",
    "best_parent",
    "comparison",
    "entries",
    "is_aggregate",
]

BEST = "best_parent"
_FIGURES = (
    "validation_accuracy",
    "test_accuracy",
    "validation_nll",
    "test_nll",
    "calibration_error",
    "mean_corruption_accuracy",
)


class Row(NamedTuple):
    """One network, or one kind of network over seeds, in a comparison.

    Attributes:
        key: its name in the files.
        name: its name for people.
        validation: accuracy on the validation images.
        test: accuracy on the test images.
        test_nll: nats, or None.
        calibration_error: expected calibration error on the test images, or None.
        difference: of the test accuracy, to the best parent; None for parents, and where no test
            can be made.
        adjusted: the difference's p-value after Holm's correction over the comparison, or None.
        evaluations: networks that its search scored, or None where nothing was searched.
        images_scored: images that each of them was scored on, a mean if they differ, or None.
        corrupted: mean corruption accuracy, or None.
        corrupted_difference: of that, to the best parent, or None.
    """

    key: str
    name: str
    validation: Interval
    test: Interval
    test_nll: float | None = None
    calibration_error: float | None = None
    difference: Difference | None = None
    adjusted: float | None = None
    evaluations: int | None = None
    images_scored: float | None = None
    corrupted: float | None = None
    corrupted_difference: Difference | None = None


class Comparison(NamedTuple):
    """Everybody against the best parent, which validation chose.

    Attributes:
        rows: parents, baselines, merged, in this order.
        best: key of the best parent's row.
        seeds: S of many runs, or 1.
        images: test images of a run.
        held_out: False where the search was scored on the test images.
    """

    rows: tuple[Row, ...]
    best: str
    seeds: int
    images: int
    held_out: bool

    def row(self, key: str) -> Row | None:
        """The row of a network, or None if there is none."""
        return next((row for row in self.rows if row.key == key), None)


def entries(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The figures of every network of a run by name: parents, baselines, merged.

    Example:
        >>> list(entries({"parents": [{}, {}], "baselines": {"ensemble": {}}, "merged": {}}))
        ['parent_0', 'parent_1', 'ensemble', 'merged']
    """
    parents = {f"parent_{k}": entry for k, entry in enumerate(results["parents"])}
    return {**parents, **results.get("baselines", {}), "merged": results["merged"]}


def best_parent(results: Mapping[str, Any]) -> int:
    """The number of the parent with the highest validation accuracy; the first of equals.

    Example:
        >>> best_parent({"parents": [{"validation_accuracy": v} for v in (0.7, 0.9, 0.9)]})
        1
    """
    return int(np.argmax([parent["validation_accuracy"] for parent in results["parents"]]))


def is_aggregate(results: Mapping[str, Any]) -> bool:
    """Whether these are the results of many seeds, made by `aggregate`."""
    return "networks" in results


def comparison(results: Mapping[str, Any], predictions: Predictions | None = None) -> Comparison:
    """Compares every network with the best parent.

    Of one run, intervals are Wilson's and differences are tested image by image (McNemar's exact
    test; a paired bootstrap for corrupted images, whose key is the run's seed). Over seeds,
    intervals are Student's and differences are paired by seed (t-test).

    Args:
        results: the content of a run's `results.json`, or what `aggregate` gave.
        predictions: of a run; without them its differences are not tested.

    Returns:
        The comparison.

    Example:
        >>> entry = {"validation_accuracy": 0.9, "test_accuracy": 0.8, "test_nll": 0.5}
        >>> run = {"parents": [entry], "merged": entry, "data": {"validation": 50, "test": 100}}
        >>> [row.name for row in comparison(run).rows]
        ['parent 0', 'merged']
    """
    found = _over_seeds(results) if is_aggregate(results) else _of_run(results, predictions)
    p_values = [np.nan if row.difference is None else row.difference.p_value for row in found.rows]
    adjusted = [None if np.isnan(p) else float(p) for p in holm(p_values)]
    rows = (row._replace(adjusted=p) for row, p in zip(found.rows, adjusted, strict=True))
    return found._replace(rows=tuple(rows))


def aggregate(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Puts runs of one experiment with different seeds together.

    Args:
        runs: the contents of their `results.json`.

    Returns:
        Plain data: `seeds`; `networks`, which for every network, and for the best parent of each
        seed (`best_parent`), hold each figure as {mean, low, high, values} and its `difference` to
        the best parent; `robustness` and `per_class_accuracy` as means; `data`.

    Raises:
        DataError: there are no runs, a seed is there twice, or the runs hold different networks or
            data. Names the seed.

    Example:
        >>> def run(seed, accuracy):
        ...     parent = {"validation_accuracy": 0.9, "test_accuracy": 0.8, "test_nll": 0.5}
        ...     merged = parent | {"test_accuracy": accuracy}
        ...     return {"parents": [parent] * 2, "merged": merged, "seed": seed,
        ...             "data": {"name": "digits", "validation": 50, "test": 100}}
        >>> both = aggregate([run(0, 0.82), run(1, 0.84)])
        >>> round(both["networks"]["merged"]["difference"]["estimate"], 3)
        0.03
    """
    runs = sorted(runs, key=lambda run: run["seed"])
    _check_alike(runs)
    tables = [_with_best(run) for run in runs]
    networks = {
        key: _summary([table[key] for table in tables], [table[BEST] for table in tables], key)
        for key in tables[0]
    }
    combined: dict[str, Any] = {
        "seeds": [run["seed"] for run in runs],
        "data": runs[0]["data"],
        "networks": networks,
    }
    if all("generations" in run for run in runs):
        combined["generations"] = _equal_or_mean(run["generations"] for run in runs)
    if all("seconds" in run for run in runs):
        stages = runs[0]["seconds"]
        combined["seconds"] = {s: sum(run["seconds"].get(s, 0.0) for run in runs) for s in stages}
    if any(run.get("not_held_out") for run in runs):
        combined["not_held_out"] = True
    if all(run.get("robustness") for run in runs):
        combined["robustness"] = _mean_robustness(runs, tables[0])
    return combined


def _of_run(results: Mapping[str, Any], predictions: Predictions | None) -> Comparison:
    data, best = results["data"], f"parent_{best_parent(results)}"
    of_all = _with_robustness(results)

    def row(key: str, entry: Mapping[str, Any]) -> Row:
        parent = key.startswith("parent_")
        evaluations = entry.get("evaluations")
        if key == "merged" and evaluations is None:
            evaluations = results.get("evaluations")
        return Row(
            key,
            _for_people(key),
            _wilson(entry["validation_accuracy"], data["validation"]),
            _wilson(entry["test_accuracy"], data["test"]),
            entry.get("test_nll"),
            entry.get("calibration_error"),
            None if parent else _mcnemar(predictions, key, best),
            evaluations=evaluations,
            images_scored=entry.get("images_scored", data["validation"]) if evaluations else None,
            corrupted=entry.get("mean_corruption_accuracy"),
            corrupted_difference=None
            if parent
            else _bootstrap(results.get("seed", 0), predictions, key, best),
        )

    rows = tuple(row(key, entry) for key, entry in of_all.items())
    return Comparison(rows, best, 1, data["test"], not results.get("not_held_out", False))


def _over_seeds(results: Mapping[str, Any]) -> Comparison:
    def interval(figure: Mapping[str, Any]) -> Interval:
        return Interval(*(_number(figure[part]) for part in ("mean", "low", "high")))

    def difference(figure: Mapping[str, Any] | None) -> Difference | None:
        if figure is None:
            return None
        return Difference(*(_number(figure[part]) for part in Difference._fields))

    def row(key: str, entry: Mapping[str, Any]) -> Row:
        return Row(
            key,
            _for_people(key),
            interval(entry["validation_accuracy"]),
            interval(entry["test_accuracy"]),
            entry.get("test_nll", {}).get("mean"),
            entry.get("calibration_error", {}).get("mean"),
            difference(entry.get("difference")),
            evaluations=entry.get("evaluations"),
            images_scored=entry.get("images_scored"),
            corrupted=entry.get("mean_corruption_accuracy", {}).get("mean"),
            corrupted_difference=difference(entry.get("corrupted_difference")),
        )

    rows = tuple(row(key, entry) for key, entry in results["networks"].items())
    held_out = not results.get("not_held_out", False)
    return Comparison(rows, BEST, len(results["seeds"]), results["data"]["test"], held_out)


def _for_people(key: str) -> str:
    return key.replace("_", " ")


def _number(value: float | None) -> float:
    """JSON has no NaN: it is written as null."""
    return np.nan if value is None else float(value)


def _wilson(accuracy: float, images: int) -> Interval:
    return proportion_interval(round(accuracy * images), images)


def _mcnemar(predictions: Predictions | None, key: str, best: str) -> Difference | None:
    if predictions is None or not {key, best} <= set(predictions.names):
        return None
    return mcnemar(correct(predictions, key), correct(predictions, best))


def _bootstrap(
    seed: int, predictions: Predictions | None, key: str, best: str
) -> Difference | None:
    if predictions is None or predictions.scores is None:
        return None
    if not {key, best} <= set(predictions.names):
        return None
    ours, theirs = (predictions.scores[predictions.names.index(name)] for name in (key, best))
    return paired_bootstrap(jax.random.key(seed), ours, theirs)


def _with_robustness(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every entry, with its mean corruption accuracy where there is one."""
    robust = results.get("robustness", {}).get("networks", {})
    return {
        key: {**entry, **{name: robust[key][name] for name in _FIGURES if name in robust[key]}}
        if key in robust
        else dict(entry)
        for key, entry in entries(results).items()
    }


def _with_best(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    of_all = _with_robustness(results)
    merged = of_all["merged"]
    merged.setdefault("evaluations", results.get("evaluations"))
    for entry in of_all.values():
        if entry.get("evaluations") is not None:
            entry.setdefault("images_scored", results["data"]["validation"])
    return {BEST: of_all[f"parent_{best_parent(results)}"], **of_all}


def _check_alike(runs: Sequence[Mapping[str, Any]]) -> None:
    if not runs:
        raise DataError("there are no runs to put together")
    for before, run in itertools.pairwise(runs):
        if before["seed"] == run["seed"]:
            raise DataError(f"seed {run['seed']} is there twice")
        if before["data"]["name"] != run["data"]["name"]:
            raise DataError(
                f"seed {run['seed']} is about {run['data']['name']}, seed {before['seed']} about "
                f"{before['data']['name']}"
            )
        odd = set(entries(before)) ^ set(entries(run))
        if odd:
            raise DataError(
                f"seeds {before['seed']} and {run['seed']} hold different networks: only one has "
                f"{', '.join(sorted(odd))}"
            )


def _summary(
    ours: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]], key: str
) -> dict[str, Any]:
    """One network over seeds; `best` are the best parents of the same seeds."""
    summary: dict[str, Any] = {}
    for figure in _FIGURES:
        if all(entry.get(figure) is not None for entry in ours):
            values = [float(entry[figure]) for entry in ours]
            mean, low, high = mean_interval(values)
            summary[figure] = {"mean": mean, "low": low, "high": high, "values": values}
    for figure in ("per_class_accuracy", "agreement"):
        if all(entry.get(figure) is not None for entry in ours):
            summary[figure] = _mean([entry[figure] for entry in ours])
    if all(entry.get("evaluations") is not None for entry in ours):
        scored = [entry["evaluations"] for entry in ours]
        images = [entry["images_scored"] for entry in ours]
        summary["evaluations"] = _equal_or_mean(scored)
        summary["images_scored"] = images[0]  # the product is to be right where they differ
        if len(set(images)) > 1:
            cost = np.mean([n * each for n, each in zip(scored, images, strict=True)])
            summary["images_scored"] = float(cost) / summary["evaluations"]
    if key != BEST and not key.startswith("parent_"):
        for name, figure in (
            ("difference", "test_accuracy"),
            ("corrupted_difference", "mean_corruption_accuracy"),
        ):
            if all(entry.get(figure) is not None for entry in (*ours, *best)):
                first, second = ([entry[figure] for entry in group] for group in (ours, best))
                summary[name] = paired_t(first, second)._asdict()
    return summary


def _mean_robustness(
    runs: Sequence[Mapping[str, Any]], like: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    first = runs[0]["robustness"]

    def accuracy(of: Callable[[Mapping[str, Any]], str]) -> dict[str, list[float]]:
        tables = [run["robustness"]["networks"][of(run)]["accuracy"] for run in runs]
        return {name: _mean([table[name] for table in tables]) for name in tables[0]}

    networks = {key: {"accuracy": accuracy(lambda run, key=key: key)} for key in first["networks"]}  # type: ignore[misc]
    networks[BEST] = {"accuracy": accuracy(lambda run: f"parent_{best_parent(run)}")}
    return {
        **{name: value for name, value in first.items() if name != "networks"},
        "networks": {key: networks[key] for key in like if key in networks},
    }


def _mean(rows: Sequence[Sequence[float | None]]) -> list[float]:
    means: list[float] = np.mean(np.asarray(rows, np.float64), axis=0).tolist()
    return means


def _equal_or_mean(values: Iterable[int]) -> int:
    return round(float(np.mean(list(values))))
