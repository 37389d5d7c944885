"""A comparison in words and tables: strings only, for a terminal as well as for a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from megajax.evaluation.results import Comparison, Rival, Row, is_aggregate, name_of
from megajax.evaluation.statistics import Difference, Interval

__all__ = [
    "NOT_HELD_OUT",
    "SMOKE",
    "agreement_table",
    "budgets",
    "caveats",
    "headline",
    "held_out_table",
    "notes",
    "p_value",
    "percent",
    "points",
    "robust_sentence",
    "robust_table",
    "run_table",
    "table",
    "task_table",
    "with_interval",
]

NOT_HELD_OUT = "Selected on the test set: the figures are not held out."
SMOKE = "Smoke run: everything was cut down to see that it works. Its figures mean nothing."

_OF_SEARCH = {
    "returned_parent": "The search returned {}: it found no mixture that scored better.",
    "still_rising": "Fitness was still rising when the search ended: a longer one may find more.",
}

Column: TypeAlias = tuple[str, Callable[[Row], str]]
_MANY_CORRUPTIONS = 8  # a page has no room for more columns


def headline(found: Comparison) -> list[str]:
    """The result in sentences: the merged network against the best parent and its other rivals."""
    parents = sum(row.key.startswith("parent_") for row in found.rows)
    merged = percent(_row(found, "merged").test.estimate)
    sentences = []
    for rival in found.rivals:
        parent, score = rival.key.removeprefix("parent_"), percent(rival.test)
        number = f"number {parent}, " if parent != rival.key else ""
        match rival.role:
            case "best":
                best = f"the best parent ({number}chosen on validation)"
                start = f"{_what(found)}: merged {merged} against {score} for {best},"
            case "best on test":
                start = f"Against the best parent on test ({number}{score}):"
            case "without search":
                which = f"{_row(found, rival.key).name}, chosen on validation, {score}"
                start = f"Against the best method without a search ({which}):"
            case _:
                costs = f", which costs {parents} networks" if parents else ""
                start = f"Against the ensemble{costs} ({score}):"
        sentences.append(f"{start} {_verdict(found, rival)}.")
    return sentences


def caveats(found: Comparison, results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before any figure; mostly nothing."""
    lines = [SMOKE] if results.get("smoke") else []
    lines += [] if found.held_out else [NOT_HELD_OUT]
    for name, sentence in _OF_SEARCH.items():
        value = results.get(name)  # over seeds, a list of what each of them says
        if not isinstance(value, list):
            lines += [sentence.format(f"parent {value}")] if value is not None else []
        elif so := sum(one is not None for one in value):
            lines.append(f"For {so} of {len(value)} seeds: {sentence.format('a parent')}")
    return lines


def robust_sentence(found: Comparison, robustness: Mapping[str, Any]) -> str | None:
    """The result on corrupted images; None where merged or parents were not tested on them."""
    best, merged = _row(found, found.best), _row(found, "merged")
    if best.corrupted is None or merged.corrupted is None:
        return None
    count = len(next(iter(robustness["networks"].values()))["accuracy"])
    severities = len(robustness["severities"])
    gain = Difference(merged.corrupted - best.corrupted, np.nan, np.nan, np.nan)
    gain = merged.corrupted_difference or gain
    return (
        f"Mean accuracy over {count} corruption{'s' if count > 1 else ''} at {severities} "
        f"severit{'ies' if severities > 1 else 'y'}: merged {percent(merged.corrupted)} against "
        f"{percent(best.corrupted)} for the best parent, {_in_points(gain)}."
    )


def table(found: Comparison, *, full: bool = False) -> list[tuple[str, ...]]:
    """The table of all methods: the header first, and a row of one cell before each group.

    Args:
        found: everybody against the best parent.
        full: with intervals, likelihood, calibration error and budgets, for which a terminal has
            no room. What nobody has is no column.
    """

    def gain(row: Row) -> str:
        return points(row.difference) + _by_seed(found, row.key, found.best)

    columns: list[Column] = [
        ("test", lambda row: percent(row.test.estimate)),
        ("to best parent [points]", gain),
        ("p (Holm)", lambda row: p_value(row.adjusted, "")),
        ("validation", lambda row: percent(row.validation.estimate)),
    ]
    if full:
        columns[0] = (
            "test [95 %]",
            lambda row: with_interval(row.test) + _by_seed(found, row.key),
        )
        columns[3:] = [
            ("validation [95 %]", lambda row: with_interval(row.validation)),
            ("NLL [nats]", lambda row: "" if row.test_nll is None else f"{row.test_nll:.3f}"),
            ("calibration error", lambda row: percent(row.calibration_error)),
            ("saw labels", lambda row: {None: "", True: "yes", False: "no"}[row.labels]),
            ("networks x images scored", _budget),
        ]
    return _table(found, columns)


def robust_table(found: Comparison, robustness: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of the accuracies on corrupted images, means over the severities.

    Args:
        found: everybody against the best parent.
        robustness: the entry of `results.json`.
    """
    networks = robustness["networks"]
    columns: list[Column] = [
        ("test", lambda row: percent(row.test.estimate)),
        ("mean over corruptions", lambda row: percent(row.corrupted)),
        ("to best parent [points]", lambda row: points(row.corrupted_difference)),
    ]

    def mean(name: str, row: Row) -> str:
        accuracy = networks.get(row.key, {}).get("accuracy", {}).get(name)
        return "" if accuracy is None else percent(float(np.mean(accuracy)))

    names = list(next(iter(networks.values()))["accuracy"])
    if len(names) <= _MANY_CORRUPTIONS:
        columns += [(name.replace("_", " "), partial(mean, name)) for name in names]
    return _table(found, columns)


def agreement_table(
    found: Comparison, figures: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, ...]]:
    """How often each network predicts what a parent does; no rows where that is not known.

    Args:
        found: everybody against the best parent.
        figures: name of a network -> its entry.
    """
    shares = {key: entry.get("agreement") or () for key, entry in figures.items()}

    def agreement(parent: int, row: Row) -> str:
        return percent(shares[row.key][parent]) if parent < len(shares[row.key]) else ""

    count = max(map(len, shares.values()))
    columns = [(f"with parent {k}", partial(agreement, k)) for k in range(count)]
    return _table(found, columns) if count else []


def task_table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Everybody's score on the tasks that the search was scored on, the header first.

    Args:
        results: of one run; no rows where it was scored on none of the user's own.

    Example:
        >>> tasks = {"noisy": {"metric": "accuracy", "merged": 0.875, "parents": [0.75, 0.5]}}
        >>> task_table({"tasks": tasks})[1:]
        [('parent 0', '0.7500'), ('parent 1', '0.5000'), ('merged', '0.8750')]
    """
    tasks = results.get("tasks") or {}
    if not tasks:
        return []
    columns = [
        (f"{name}: {of['metric'].replace('_', ' ')}", *of["parents"], of["merged"])
        for name, of in tasks.items()
    ]
    count = len(columns[0]) - 2
    names = ("network", *(f"parent {k}" for k in range(count)), "merged")
    cells = [[x if isinstance(x, str) else f"{x:.4f}" for x in column] for column in columns]
    return list(zip(names, *cells, strict=True))


def held_out_table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Everybody's score on the tasks' test examples, the header first.

    Args:
        results: of one run; no rows where it has none.

    Example:
        >>> gain = {"estimate": 0.125, "low": -0.01, "high": 0.25, "p_value": 0.1}
        >>> networks = {"parent_0": {"score": 0.75}, "merged": {"score": 0.875, "difference": gain}}
        >>> test = {"examples": 8, "best": "parent_0", "networks": networks}
        >>> for row in held_out_table({"tasks": {"noisy": {"metric": "accuracy", "test": test}}}):
        ...     print(row)
        ('network', 'noisy: accuracy', 'to parent 0 [95 %]')
        ('parent 0', '0.7500', '')
        ('merged', '0.8750', '+0.1250 [-0.0100, 0.2500]')
    """
    tasks = {name: of for name, of in (results.get("tasks") or {}).items() if "test" in of}
    if not tasks:
        return []

    def cells(entry: Mapping[str, Any]) -> tuple[str, str]:
        score, gain = entry.get("score"), entry.get("difference") or {}
        cell = "" if score is None else f"{score:.4f}"
        if gain.get("low") is None:
            return cell, ""
        return cell, f"{gain['estimate']:+.4f} [{gain['low']:.4f}, {gain['high']:.4f}]"

    tests = [of["test"] for of in tasks.values()]
    header = ["network"]
    for name, of in tasks.items():
        to = f"to {name_of(of['test']['best'])} [95 %]"
        header += [f"{name}: {of['metric'].replace('_', ' ')}", to]
    rows = [tuple(header)]
    for key in dict.fromkeys(key for test in tests for key in test["networks"]):
        each = [cells(test["networks"].get(key, {})) for test in tests]
        rows.append((name_of(key), *(cell for pair in each for cell in pair)))
    return rows


def run_table(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run: a row for each choice or fact; the header first."""
    data = results["data"]
    train = f"{data['train']:,} training, " if "train" in data else ""
    sizes = f"{train}{data['validation']:,} validation and {data['test']:,} test images, disjoint"
    if not results.get("not_held_out"):
        sizes += "; the test images were looked at once, at the end"
    many = is_aggregate(results)
    merged = results["networks"]["merged"] if many else results
    cost = [f"{results['generations']:,} generations"] if "generations" in results else []
    if merged.get("evaluations") is not None:
        cost.append(f"{merged['evaluations']:,} networks scored")
    seconds = results.get("seconds") or {}
    seed = str(results.get("seed", ""))
    took = [f"{stage} {taken:.0f}" for stage, taken in seconds.items() if taken >= 0.5]
    rows = [
        ("data", f"{data['name']}: {sizes}"),
        *((name, str(value)) for name, value in results.get("settings", {}).items()),
        ("cost of the search", ", ".join(cost)),
        ("seeds", ", ".join(map(str, results["seeds"]))) if many else ("seed", seed),
        ("seconds", ", ".join(took)),
    ]
    return [("what", "how"), *(row for row in rows if row[1])]


def budgets(found: Comparison) -> str | None:
    """Which searches had the merged network's budget and which not; None if there is no other.

    Budgets are the same that differ by one network on all images at most: what a search pays for by
    the image, another one pays for by the network.
    """
    merged = _row(found, "merged")
    others = [
        row
        for row in found.rows
        if row.evaluations and row.group == "by search" and row.key != "merged"
    ]
    if not merged.evaluations or not others:
        return None
    one = max(row.images_scored or 0 for row in (*others, merged))  # the images of one network
    equal = {row.key for row in others if abs(_cost(row) - _cost(merged)) <= one}
    same = [row.name for row in others if row.key in equal]
    different = [f"{row.name} {_budget(row)}" for row in others if row.key not in equal]
    parts = [f"The merged network's search scored {_budget(merged)} networks x images"]
    parts += [f"{_and(same)} had the same budget"] if same else []
    parts += [f"other budgets: {', '.join(different)}"] if different else []
    return "; ".join(parts) + "."


def notes(found: Comparison) -> Iterator[str]:
    """How the figures were made, and where they seem to contradict each other."""
    best, merged = _row(found, found.best), _row(found, "merged")
    if found.held_out:
        yield (
            "Choosing on validation images flatters what was chosen: from validation to test, the "
            f"merged network goes {_change(merged)} and the best parent {_change(best)}."
        )
    if found.by_seed:
        yield (
            f"Means over {found.seeds} seeds, with the figure of each seed in brackets: they are "
            "too few for an interval or a test."
        )
    elif found.seeds > 1:
        yield (
            f"Means over {found.seeds} seeds with 95 % intervals of Student's t; differences are "
            "paired by seed. The best parent is chosen on validation anew for each seed."
        )
    elif any(row.difference is not None for row in found.rows):
        yield (
            "All intervals are 95 % intervals: Wilson's for an accuracy, Bonett and Price's for a "
            "difference on the same images, which is what McNemar's exact test is about. They "
            "account for the choice of test images, but not for that of the seed."
        )
    tested = [row for row in found.rows if row.difference and row.adjusted is not None]
    if not tested:
        return
    odd = [row.name for row in tested if _excludes_zero(row) != ((row.adjusted or 0) <= 0.05)]
    yield (
        f"The p-values of the table are adjusted by Holm's method for its {len(tested)} "
        "comparisons. Its intervals are not, and neither is anything in the sentences at the top, "
        "each of which asks one question."
        + (f" That is why the interval and the p-value disagree for {_and(odd)}." if odd else "")
    )


def percent(share: float | None) -> str:
    """A share as a percentage, or nothing.

    >>> percent(0.8213)
    '82.1 %'
    """
    return "" if share is None or np.isnan(share) else f"{100 * share:.1f} %"


def with_interval(interval: Interval) -> str:
    """A share with its interval, or without where there is none.

    >>> with_interval(Interval(0.8, 0.7112, 0.8666))
    '80.0 % [71.1, 86.7]'
    """
    return percent(interval.estimate) + _limits(interval.low, interval.high)


def points(difference: Difference | None) -> str:
    """A difference of shares in percentage points, with its interval.

    >>> points(Difference(0.012, -0.003, 0.027, 0.1))
    '+1.2 [-0.3, 2.7]'
    """
    if difference is None:
        return ""
    estimate = round(100 * difference.estimate, 1) + 0.0  # no -0.0
    return f"{estimate:+.1f}" + _limits(difference.low, difference.high)


def p_value(value: float | None, name: str = "p") -> str:
    """A p-value to three digits.

    >>> p_value(0.0123), p_value(1e-9), p_value(0.5, name="")
    ('p = 0.012', 'p < 0.001', '0.500')
    """
    if value is None or np.isnan(value):
        return ""
    relation, digits = ("<", "0.001") if value < 0.001 else ("=", f"{value:.3f}")
    if name:
        return f"{name} {relation} {digits}"
    return digits if relation == "=" else f"{relation} {digits}"


def _and(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _limits(low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(high):
        return ""
    # Rounded first, so that a small negative number does not become -0.0.
    return f" [{round(100 * low, 1) + 0.0:.1f}, {round(100 * high, 1) + 0.0:.1f}]"


def _in_points(difference: Difference) -> str:
    """As `points`, with the unit before the interval."""
    estimate, _, limits = points(difference).partition(" ")
    return f"{estimate} points{' ' if limits else ''}{limits}"


def _by_seed(found: Comparison, key: str, other: str | None = None) -> str:
    """The test accuracies of few seeds, or by how much they exceed another network's."""
    if not found.by_seed or key == other or found.by_seed.get(key) is None:
        return ""
    if other is None:
        return f" ({', '.join(f'{100 * value:.1f}' for value in found.by_seed[key])})"
    gains = np.subtract(found.by_seed[key], found.by_seed[other])
    return f" ({', '.join(f'{100 * value:+.1f}' for value in gains)})"


def _verdict(found: Comparison, rival: Rival) -> str:
    gain = _row(found, "merged").test.estimate - rival.test
    difference = rival.difference or Difference(gain, np.nan, np.nan, np.nan)
    text = _in_points(difference) + _by_seed(found, "merged", rival.key)
    if np.isfinite(difference.p_value):
        text += f", {p_value(difference.p_value)}"
        test = "exact McNemar test" if found.seeds == 1 else "t-test paired by seed"
        text += f" ({test})" if rival.role == "best" else ""
    return text


def _what(found: Comparison) -> str:
    images = f"{found.images:,}"
    if not found.held_out:
        what = f"Accuracy on {images} test images that the search itself was scored on"
        return what if found.seeds == 1 else f"{what}, {found.seeds} seeds"
    if found.seeds == 1:
        return f"Test accuracy on {images} held-out images"
    return f"Test accuracy over {found.seeds} seeds, {images} held-out images each"


def _excludes_zero(row: Row) -> bool:
    return row.difference is not None and not row.difference.low <= 0 <= row.difference.high


def _cost(row: Row) -> int:
    return round((row.evaluations or 0) * (row.images_scored or 0))


def _budget(row: Row) -> str:
    if not row.evaluations or row.images_scored is None:
        return ""
    images = row.images_scored
    return f"{row.evaluations:,} x {images:,.{0 if images == round(images) else 1}f}"


def _change(row: Row) -> str:
    change = 100 * (row.test.estimate - row.validation.estimate)
    return f"{'up' if change >= 0 else 'down'} by {abs(change):.1f} points"


def _row(found: Comparison, key: str) -> Row:
    return next(row for row in found.rows if row.key == key)


def _table(found: Comparison, columns: Sequence[Column]) -> list[tuple[str, ...]]:
    kept = [(title, cell) for title, cell in columns if any(map(cell, found.rows))]
    rows: list[tuple[str, ...]] = [("network", *(title for title, _ in kept))]
    for group, members in found.groups():
        rows.append((group.capitalize(),))
        for row in members:
            chosen = row.key == found.best and row.key.startswith("parent_")
            name = f"{row.name} (chosen on validation)" if chosen else row.name
            rows.append((name, *(cell(row) for _, cell in kept)))
    return rows
