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
    [metric]     name of the fitness
    [tasks]      name -> {metric, merged: score, parents: [K] scores [, test]}, where the search was
                 scored on tasks of the user's own, or by a metric that no entry holds; test:
                 examples, best (name of the parent with the highest fitness), networks: name ->
                 {score [, difference: to the best, {estimate, low, high, p_value}]}
    [settings]   what was run: subject -> words, and fields with their values
    [seconds]    stage -> seconds
    [path]       shares, lines: name -> points {accuracy, nll}, merged: {share, accuracy, nll}
    [robustness] networks: name -> {mean_corruption_accuracy, accuracy: corruption -> [S]},
                 severities [S], examples [, published]
    [front]      tasks: T names, points: [F, T] scores of the front, networks: name -> [T] scores;
                 made by `megajax.report.front`
    [not_held_out]    true where the search was scored on the test images
    [smoke]           true where everything was cut down to a trial
    [returned_parent] number of the parent that the merged network is, mixture of nothing
    [still_rising]    true where the last tenth of the generations brought over a hundredth of all
                      that the best fitness rose by in the search

An entry is one network's figures: `validation_accuracy`, `test_accuracy`, `test_nll` (nats)
[, `validation_nll`, `fitness`, `calibration_error`, `per_class_accuracy` (one for each class),
`agreement` (with each parent), `evaluations` (networks that its own method scored), `images_scored`
(images that each of those was scored on, a mean if they differ; the validation images if it is
missing), `searches` (whether it scored as many as its budget allowed; if it is missing, whether it
scored any), `labels` (whether its method saw labels; likewise)].
Shares and accuracies lie in [0, 1]. In `predictions.npz` and in `robustness`, a network's name is
`parent_0`, ..., the name of a baseline, or `merged`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
    "FEWEST",
    "ON_TEST",
    "Comparison",
    "Rival",
    "Row",
    "aggregate",
    "best_parent",
    "comparison",
    "entries",
    "is_aggregate",
    "name_of",
]

BEST, ON_TEST = "best_parent", "best_parent_on_test"
"""Keys of an aggregate: the parent that is best for each seed, on validation and on test images."""

FEWEST = 5
"""Seeds from which on a mean has an interval; of fewer ones, each is shown."""

_GROUPS = ("parents", "without search", "by search", "fine-tuned", "ensemble")
_FIGURES = (
    "validation_accuracy",
    "test_accuracy",
    "validation_nll",
    "test_nll",
    "calibration_error",
    "mean_corruption_accuracy",
)
_DIFFERENCES = {
    "difference": "test_accuracy",
    "corrupted_difference": "mean_corruption_accuracy",
}
_NAMES = {
    BEST: "best parent of each seed",
    ON_TEST: "best parent on test of each seed",
    "uniform_average": "average",
    "slerp": "SLERP",
    "fisher": "Fisher average",
    "regmean": "RegMean",
    "regmean_plus": "RegMean++",
    "pleas": "PLeaS",
    "ties": "TIES",
    "dare": "DARE",
    "line": "best point of the line",
    "cma_es": "CMA-ES",
    "sep_cma_es": "CMA-ES, separable",
    "ensemble": "ensemble of the parents",
}


class Row(NamedTuple):
    """One network, or one kind of network over seeds, in a comparison.

    Attributes:
        key: its name in the files.
        name: its name for people.
        group: `parents`, `without search`, `by search`, `fine-tuned` or `ensemble`.
        validation: accuracy on the validation images.
        test: accuracy on the test images.
        test_nll: nats, or None.
        calibration_error: expected calibration error on the test images, or None.
        difference: of the test accuracy, to the best parent; None for parents, and where no test
            can be made.
        adjusted: the difference's p-value after Holm's correction over the comparison, or None.
        evaluations: networks that its method scored, or None where it scored none.
        images_scored: images that each of them was scored on, a mean if they differ, or None.
        labels: whether its method saw labels, or None for parents.
        corrupted: mean corruption accuracy, or None.
        corrupted_difference: of that, to the best parent, or None.
    """

    key: str
    name: str
    group: str
    validation: Interval
    test: Interval
    test_nll: float | None = None
    calibration_error: float | None = None
    difference: Difference | None = None
    adjusted: float | None = None
    evaluations: int | None = None
    images_scored: float | None = None
    labels: bool | None = None
    corrupted: float | None = None
    corrupted_difference: Difference | None = None


class Rival(NamedTuple):
    """Somebody whom the merged network must stand up to.

    Attributes:
        role: `best` (the best parent), `best on test` (the parent that is better on the test
            images, if there is one), `without search` (the best of its group) or `ensemble`. All
            but the second are chosen on validation.
        key: its name in the files.
        test: its accuracy on the test images.
        difference: the merged network's minus that, or None where no test can be made.
    """

    role: str
    key: str
    test: float
    difference: Difference | None


class Comparison(NamedTuple):
    """Everybody against the best parent, which validation chose.

    Attributes:
        rows: parents, baselines, merged, in this order.
        best: key of the best parent's row.
        seeds: S of many runs, or 1.
        images: test images of a run.
        held_out: False where the search was scored on the test images.
        rivals: whom the merged network is set against by name.
        by_seed: the test accuracies of each network, where seeds are too few for intervals.
    """

    rows: tuple[Row, ...]
    best: str
    seeds: int
    images: int
    held_out: bool
    rivals: tuple[Rival, ...] = ()
    by_seed: Mapping[str, Sequence[float]] = {}

    def row(self, key: str) -> Row | None:
        """The row of a network, or None if there is none."""
        return next((row for row in self.rows if row.key == key), None)

    def groups(self) -> Iterator[tuple[str, list[Row]]]:
        """The rows by group, in the order in which they are shown."""
        for group in _GROUPS:
            rows = [row for row in self.rows if row.group == group]
            if rows:
                yield group, rows


def name_of(key: str) -> str:
    """The name of a network for people.

    Example:
        >>> name_of("parent_0"), name_of("aligned_regmean"), name_of("my_method")
        ('parent 0', 'RegMean, aligned parents', 'my method')
    """
    for how in ("aligned", "recalibrated"):
        if key.startswith(f"{how}_"):
            return f"{name_of(key.removeprefix(f'{how}_'))}, {how} parents"
    return _NAMES.get(key, key.replace("_", " "))


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
    many, data = is_aggregate(results), results["data"]
    networks = results["networks"] if many else _networks(results)
    best = BEST if many else f"parent_{best_parent(results)}"
    compare: Callable[[str, str, str], Difference | None] = partial(_by_seed, networks)
    if not many:
        compare = partial(_by_image, predictions, results.get("seed", 0))

    def row(key: str, entry: Mapping[str, Any]) -> Row:
        parent = _group(key, entry) == "parents"
        gain, robust = (None if parent else compare(f, key, best) for f in _DIFFERENCES.values())
        return Row(
            key=key,
            name=name_of(key),
            group=_group(key, entry),
            validation=_interval(entry["validation_accuracy"], data["validation"]),
            test=_interval(entry["test_accuracy"], data["test"]),
            test_nll=_mean(entry.get("test_nll")),
            difference=gain,
            calibration_error=_mean(entry.get("calibration_error")),
            evaluations=entry.get("evaluations"),
            images_scored=entry.get("images_scored"),
            labels=None if parent else entry.get("labels", bool(entry.get("evaluations"))),
            corrupted=_mean(entry.get("mean_corruption_accuracy")),
            corrupted_difference=robust,
        )

    rows = [row(key, entry) for key, entry in networks.items()]
    p_values = holm([np.nan if row.difference is None else row.difference.p_value for row in rows])
    few = many and 1 < len(results["seeds"]) < FEWEST
    return Comparison(
        rows=tuple(
            row._replace(adjusted=None if np.isnan(p) else float(p))
            for row, p in zip(rows, p_values, strict=True)
        ),
        best=best,
        seeds=len(results["seeds"]) if many else 1,
        images=data["test"],
        held_out=not results.get("not_held_out", False),
        rivals=tuple(
            Rival(role, row.key, row.test.estimate, compare("test_accuracy", "merged", row.key))
            for role, row in _rivals(rows, best)
        ),
        by_seed={key: entry["test_accuracy"]["values"] for key, entry in networks.items()}
        if few
        else {},
    )


def aggregate(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Puts runs of one experiment with different seeds together.

    Args:
        runs: the contents of their `results.json`.

    Returns:
        Plain data: `seeds`; `networks`, which for every network, and for the best parent of each
        seed (`best_parent`), hold each figure as {mean, low, high, values} and its `difference` to
        the best parent; `robustness` and `per_class_accuracy` as means; `data`; the `settings` that
        all runs have in common. What a run says of itself (`returned_parent`, ...) is a list.

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
    if all(table[ON_TEST] == table[BEST] for table in tables):
        tables = [{k: v for k, v in table.items() if k != ON_TEST} for table in tables]
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
        combined["generations"] = round(float(np.mean([run["generations"] for run in runs])))
    if all("seconds" in run for run in runs):
        stages = runs[0]["seconds"]
        combined["seconds"] = {s: sum(run["seconds"].get(s, 0.0) for run in runs) for s in stages}
    settings = [run.get("settings", {}) for run in runs]
    combined["settings"] = {
        name: words
        for name, words in settings[0].items()
        if all(other.get(name) == words for other in settings)
    }
    for name in ("not_held_out", "smoke"):
        if any(run.get(name) for run in runs):
            combined[name] = True
    for name in ("returned_parent", "still_rising"):
        combined[name] = [run.get(name) for run in runs]
    if all(run.get("robustness") for run in runs):
        combined["robustness"] = _mean_robustness(runs, tables[0])
    return combined


def _group(key: str, entry: Mapping[str, Any]) -> str:
    if key in (BEST, ON_TEST) or key.startswith("parent_"):
        return "parents"
    if key == "ensemble":
        return key
    if key.endswith("_finetuned"):
        return "fine-tuned"
    searches = entry.get("searches", bool(entry.get("evaluations")))
    return "by search" if searches or key == "merged" else "without search"


def _rivals(rows: Sequence[Row], best: str) -> Iterator[tuple[str, Row]]:
    first = next(row for row in rows if row.key == best)
    yield "best", first
    on_test = max(
        (row for row in rows if row.group == "parents"), key=lambda row: row.test.estimate
    )
    if on_test.test.estimate > first.test.estimate:
        yield "best on test", on_test
    plain = [row for row in rows if row.group == "without search"]
    if plain:
        yield "without search", max(plain, key=lambda row: row.validation.estimate)
    yield from (("ensemble", row) for row in rows if row.key == "ensemble")


def _by_image(
    predictions: Predictions | None, seed: int, figure: str, ours: str, theirs: str
) -> Difference | None:
    if predictions is None or not {ours, theirs} <= set(predictions.names):
        return None
    if figure == "test_accuracy":
        return mcnemar(correct(predictions, ours), correct(predictions, theirs))
    if predictions.scores is None:
        return None
    pair = (predictions.scores[predictions.names.index(key)] for key in (ours, theirs))
    return paired_bootstrap(jax.random.key(seed), *pair)


def _by_seed(
    networks: Mapping[str, Mapping[str, Any]], figure: str, ours: str, theirs: str
) -> Difference | None:
    first, second = (networks[key].get(figure) for key in (ours, theirs))
    return _paired(first["values"], second["values"]) if first and second else None


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    found = paired_t(ours, theirs)
    few = len(ours) < FEWEST
    return Difference(found.estimate, np.nan, np.nan, np.nan) if few else found


def _interval(figure: Any, images: int) -> Interval:
    """An accuracy of a run, or over seeds. JSON has no NaN: it is written as null."""
    if not isinstance(figure, Mapping):
        return proportion_interval(round(figure * images), images)
    parts = (figure[part] for part in ("mean", "low", "high"))
    return Interval(*(np.nan if part is None else float(part) for part in parts))


def _mean(figure: Any) -> float | None:
    return figure["mean"] if isinstance(figure, Mapping) else figure


def _networks(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every entry of a run, with what is missing in it: what it cost, and its robustness."""
    robust = results.get("robustness", {}).get("networks", {})
    networks = {key: dict(entry) for key, entry in entries(results).items()}
    networks["merged"].setdefault("evaluations", results.get("evaluations"))
    for key, entry in networks.items():
        if key in robust:
            entry["mean_corruption_accuracy"] = robust[key]["mean_corruption_accuracy"]
        if entry.get("evaluations"):
            entry.setdefault("images_scored", results["data"]["validation"])
    return networks


def _with_best(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    networks = _networks(results)
    on_test = np.argmax([parent["test_accuracy"] for parent in results["parents"]])
    best = {
        BEST: networks[f"parent_{best_parent(results)}"],
        ON_TEST: networks[f"parent_{on_test}"],
    }
    return {**best, **networks}


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

    def values(entries: Sequence[Mapping[str, Any]], figure: str) -> list[Any] | None:
        found = [entry.get(figure) for entry in entries]
        return None if None in found else found

    summary: dict[str, Any] = {n: ours[0][n] for n in ("searches", "labels") if n in ours[0]}
    for figure in _FIGURES:
        if found := values(ours, figure):
            mean, low, high = mean_interval(found)
            if len(found) < FEWEST:
                low = high = np.nan
            summary[figure] = {"mean": mean, "low": low, "high": high, "values": found}
    for figure in ("per_class_accuracy", "agreement"):
        if found := values(ours, figure):
            summary[figure] = _means(found)
    if scored := values(ours, "evaluations"):
        images = [entry["images_scored"] for entry in ours]
        summary["evaluations"] = round(float(np.mean(scored)))
        summary["images_scored"] = images[0]  # the product is to be right where they differ
        if len(set(images)) > 1:
            summary["images_scored"] = float(np.dot(scored, images)) / len(ours)
            summary["images_scored"] /= summary["evaluations"]
    for name, figure in _DIFFERENCES.items():
        first, second = values(ours, figure), values(best, figure)
        if first and second and _group(key, summary) != "parents":
            summary[name] = _paired(first, second)._asdict()
    return summary


def _mean_robustness(
    runs: Sequence[Mapping[str, Any]], like: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    first = runs[0]["robustness"]

    def accuracy(of: Callable[[Mapping[str, Any]], str]) -> dict[str, list[float]]:
        tables = [run["robustness"]["networks"][of(run)]["accuracy"] for run in runs]
        return {name: _means([table[name] for table in tables]) for name in tables[0]}

    networks = {key: {"accuracy": accuracy(lambda run, key=key: key)} for key in first["networks"]}  # type: ignore[misc]
    networks[BEST] = {"accuracy": accuracy(lambda run: f"parent_{best_parent(run)}")}
    return {
        **{name: value for name, value in first.items() if name != "networks"},
        "networks": {key: networks[key] for key in like if key in networks},
    }


def _means(rows: Sequence[Sequence[float | None]]) -> list[float]:
    return np.mean(np.asarray(rows, np.float64), axis=0).tolist()
