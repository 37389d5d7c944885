"""A comparison in words and tables: strings only, for a terminal as well as for a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from megajax.evaluation.results import Comparison, Row
from megajax.evaluation.statistics import Difference, Interval

__all__ = [
    "agreement_table",
    "budgets",
    "notes",
    "p_value",
    "percent",
    "points",
    "robust_sentence",
    "robust_table",
    "sentence",
    "table",
    "with_interval",
]

Column: TypeAlias = tuple[str, Callable[[Row], str]]
_NETWORK = "network"


def sentence(found: Comparison) -> str:
    """The result in one sentence: merged against the best parent, which validation chose."""
    best, merged = _row(found, found.best), _row(found, "merged")
    which = "chosen on validation"
    if found.best.startswith("parent_"):
        which = f"number {found.best.removeprefix('parent_')}, {which}"
    text = (
        f"{_what(found)}: merged {percent(merged.test.estimate)} against "
        f"{percent(best.test.estimate)} for the best parent ({which}), "
        f"{_verdict(merged.test.estimate - best.test.estimate, merged.difference)}"
    )
    if merged.difference is not None and np.isfinite(merged.difference.p_value):
        test = "exact McNemar test" if found.seeds == 1 else "t-test paired by seed"
        text += f", {p_value(merged.difference.p_value)} ({test})"
    ensemble = found.row("ensemble")
    if ensemble is not None:
        text += f"; ensemble {percent(ensemble.test.estimate)}"
    return f"{text}."


def robust_sentence(found: Comparison, robustness: Mapping[str, Any]) -> str | None:
    """The same for corrupted images; None where merged or parents were not tested on them."""
    best, merged = _row(found, found.best), _row(found, "merged")
    if best.corrupted is None or merged.corrupted is None:
        return None
    count = len(next(iter(robustness["networks"].values()))["accuracy"])
    severities = len(robustness["severities"])
    return (
        f"Mean accuracy over {_many(count, 'corruption')} at "
        f"{_many(severities, 'severity', 'severities')}: merged {percent(merged.corrupted)} "
        f"against {percent(best.corrupted)} for the best parent, "
        f"{_verdict(merged.corrupted - best.corrupted, merged.corrupted_difference)}."
    )


def table(found: Comparison, *, full: bool = False) -> list[tuple[str, ...]]:
    """The table of all methods: rows of strings, the header first; what nobody has is no column.

    Args:
        found: everybody against the best parent.
        full: with intervals, likelihood, calibration error and budgets, for which a terminal has
            no room.
    """
    columns: list[Column] = [
        (_NETWORK, lambda row: _name(row, found)),
        ("validation", lambda row: percent(row.validation.estimate)),
        ("test", lambda row: percent(row.test.estimate)),
        ("to best parent [points]", lambda row: points(row.difference)),
        ("p (Holm)", lambda row: p_value(row.adjusted, "")),
    ]
    if full:
        columns[1:3] = [
            ("validation [95 %]", lambda row: with_interval(row.validation)),
            ("test [95 %]", lambda row: with_interval(row.test)),
        ]
        columns += [
            ("NLL [nats]", lambda row: "" if row.test_nll is None else f"{row.test_nll:.3f}"),
            ("calibration error", lambda row: percent(row.calibration_error)),
            ("networks x images scored", _budget),
        ]
    return _table(found.rows, columns)


def robust_table(found: Comparison, robustness: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of the accuracies on corrupted images, means over the severities.

    Args:
        found: everybody against the best parent.
        robustness: the entry of `results.json`.
    """
    networks = robustness["networks"]
    columns: list[Column] = [
        (_NETWORK, lambda row: _name(row, found)),
        ("test", lambda row: percent(row.test.estimate)),
        ("mean over corruptions", lambda row: percent(row.corrupted)),
        ("to best parent [points]", lambda row: points(row.corrupted_difference)),
    ]

    def mean(name: str) -> Column:
        def cell(row: Row) -> str:
            accuracy = networks.get(row.key, {}).get("accuracy", {}).get(name)
            return "" if accuracy is None else percent(float(np.mean(accuracy)))

        return name.replace("_", " "), cell

    columns += [mean(name) for name in next(iter(networks.values()))["accuracy"]]
    return _table(found.rows, columns)


def agreement_table(
    found: Comparison, figures: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, ...]]:
    """How often each network predicts what a parent does; no rows where that is not known.

    Args:
        found: everybody against the best parent.
        figures: name of a network -> its entry.
    """
    shares = {row.key: figures[row.key].get("agreement") or () for row in found.rows}

    def agreement(parent: int) -> Column:
        def cell(row: Row) -> str:
            return percent(shares[row.key][parent]) if parent < len(shares[row.key]) else ""

        return f"with parent {parent}", cell

    columns = [agreement(k) for k in range(max(map(len, shares.values())))]
    if not columns:
        return []
    return _table(found.rows, [(_NETWORK, lambda row: _name(row, found)), *columns])


def budgets(found: Comparison) -> str | None:
    """Who was chosen with the merged network's budget and who not; None if nobody else has one.

    Budgets are the same that differ by less than one network on all images: what a search pays for
    by the image, another one pays for by the network.
    """
    merged = _row(found, "merged")
    others = [row for row in found.rows if row.evaluations and row.key != "merged"]
    if not merged.evaluations or not others:
        return None
    same: list[str] = []
    different: list[str] = []
    one = max(row.images_scored or 0 for row in (*others, merged))  # the images of one network
    for row in others:
        equal = abs(_cost(row) - _cost(merged)) < one
        (same if equal else different).append(row.name if equal else f"{row.name} {_budget(row)}")
    parts = [f"The merged network's search scored {_budget(merged)} networks x images"]
    parts += [f"the same budget had {', '.join(same)}"] if same else []
    parts += [f"another one had {', '.join(different)}"] if different else []
    return "; ".join(parts) + "."


def notes(found: Comparison) -> list[str]:
    """How the figures were made, a sentence or two for each kind."""
    best, merged = _row(found, found.best), _row(found, "merged")
    lines = []
    if found.held_out:
        lines.append(
            "Choosing on validation images flatters what was chosen: from validation to test the "
            f"merged network goes {_change(merged)}, the best parent {_change(best)}."
        )
    if found.seeds > 1:
        lines.append(
            f"Means over {found.seeds} seeds with 95 % intervals of Student's t; differences are "
            "paired by seed. The best parent is chosen on validation for each seed anew."
        )
    elif any(row.difference is not None for row in found.rows):
        lines.append(
            "Intervals hold with 95 %: Wilson's for an accuracy; Bonett and Price's for a "
            "difference on the same images, which McNemar's exact test is about. They know of the "
            "choice of test images alone, not of the seed."
        )
    if any(row.adjusted is not None for row in found.rows):
        lines.append(
            "The p-values of the table are adjusted by Holm's method for being many; the one in "
            "the sentence on top, which asks one question, is not."
        )
    return lines


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


def _limits(low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(high):
        return ""
    # Rounded first, so that a small negative number does not become -0.0.
    return f" [{round(100 * low, 1) + 0.0:.1f}, {round(100 * high, 1) + 0.0:.1f}]"


def _verdict(estimate: float, difference: Difference | None) -> str:
    known = difference is not None and np.isfinite(difference.low)
    limits = _limits(difference.low, difference.high) if difference and known else ""
    return f"{100 * estimate:+.1f} points{limits}"


def _what(found: Comparison) -> str:
    images = f"{found.images:,}"
    if not found.held_out:
        what = f"Accuracy on {images} test images that the search itself was scored on"
    elif found.seeds == 1:
        return f"Test accuracy on {images} held-out images"
    else:
        return f"Test accuracy over {found.seeds} seeds, {images} held-out images each"
    return what if found.seeds == 1 else f"{what}, {found.seeds} seeds"


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


def _many(count: int, one: str, more: str | None = None) -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _name(row: Row, found: Comparison) -> str:
    best = row.key == found.best and row.key.startswith("parent_")
    return f"{row.name} (best)" if best else row.name


def _row(found: Comparison, key: str) -> Row:
    return next(row for row in found.rows if row.key == key)


def _table(found: Sequence[Row], columns: Sequence[Column]) -> list[tuple[str, ...]]:
    filled = [[cell(row) for row in found] for _, cell in columns]
    kept = [i for i, cells in enumerate(filled) if any(cells)]
    header = tuple(columns[i][0] for i in kept)
    return [header, *zip(*(filled[i] for i in kept), strict=True)]
