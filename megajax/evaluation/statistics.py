"""How sure a figure is: intervals, paired tests, and a correction for asking many questions.

Knows numbers alone: which examples two networks got right, or one figure for each seed. Every test
is paired, because networks that are compared saw the same examples, or the same seeds. A difference
is always the first minus the second. What cannot be known (an interval from one seed) is NaN.

Example:
    >>> ours, theirs = np.array([1, 1, 1, 1, 1, 1, 0, 1]), np.array([0, 0, 1, 0, 0, 0, 0, 0])
    >>> mcnemar(ours, theirs).p_value
    0.03125
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from scipy import stats

from megajax.errors import DataError
from megajax.types import Key

__all__ = [
    "Difference",
    "Interval",
    "bootstrap",
    "holm",
    "mcnemar",
    "mean_interval",
    "paired_bootstrap",
    "paired_t",
    "proportion_interval",
]

_BLOCK = 1 << 22  # counts drawn at a time by the bootstrap: 32 MB


class Interval(NamedTuple):
    """An estimate and its confidence interval.

    Attributes:
        estimate: the figure itself.
        low: lower limit.
        high: upper limit.
    """

    estimate: float
    low: float
    high: float


class Difference(NamedTuple):
    """First minus second, its confidence interval, and the test of no difference.

    Attributes:
        estimate: the difference itself.
        low: lower limit.
        high: upper limit.
        p_value: two-sided.
    """

    estimate: float
    low: float
    high: float
    p_value: float


def proportion_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """An accuracy with Wilson's score interval.

    Args:
        successes: examples that were right.
        total: examples in all, at least 1.
        confidence: nominal coverage.

    Returns:
        The share and its interval, which stays inside [0, 1].

    Raises:
        DataError: there are no examples, or more successes than examples.

    Example:
        >>> [round(value, 4) for value in proportion_interval(81, 263)]
        [0.308, 0.2553, 0.3662]

    Source: Wilson (1927); the example is Newcombe's, Statistics in Medicine 17 (1998).
    """
    if not 0 <= successes <= total or total < 1:
        raise DataError(f"{successes} of {total} examples are right: no share can be made of that")
    limits = stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return Interval(successes / total, float(limits.low), float(limits.high))


def mcnemar(first: npt.ArrayLike, second: npt.ArrayLike, confidence: float = 0.95) -> Difference:
    """Two networks' accuracies on the same examples: McNemar's exact test.

    The test asks only the examples that one network got right and the other wrong. The interval is
    Bonett and Price's, which covers well from small samples on.

    Args:
        first: `[N]`, true where the first network is right.
        second: `[N]`, alike.
        confidence: nominal coverage of the interval.

    Returns:
        The difference of the accuracies.

    Raises:
        DataError: the two are not of the same length, or empty.

    Example:
        >>> before, after = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [1, 1, 7, 12], axis=0).T
        >>> [round(value, 4) for value in mcnemar(before, after)]
        [-0.2857, -0.5084, -0.0134, 0.0703]

    Source: McNemar (1947); Bonett and Price, J. Educ. Behav. Stat. 37 (2012); the example is from
    Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), who compare such intervals.
    """
    first, second = _pairs(first, second)
    first, second, n = first.astype(bool), second.astype(bool), len(first)
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    p_value = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    more, fewer = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    error = np.sqrt((more + fewer - (more - fewer) ** 2) / (n + 2))
    low, high = np.clip(stats.norm.interval(confidence, more - fewer, error), -1, 1)
    return Difference((gained - lost) / n, float(low), float(high), float(p_value))


def paired_bootstrap(
    key: Key,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """Any score of two networks on the same examples: the examples are drawn anew many times.

    Args:
        key: PRNG key.
        first: scores `[N]` of the first network, such as 0 and 1 or log-likelihoods.
        second: `[N]`, alike.
        resamples: how many times N examples are drawn with replacement.
        confidence: nominal coverage of the percentile interval.

    Returns:
        The difference of the mean scores. The p-value is the share of resamples whose difference,
        once the observed one is taken off, is at least as large as that; never below
        1 / (resamples + 1).

    Raises:
        DataError: the two are not of the same length, or empty.

    Example:
        >>> ours, theirs = np.arange(100) + 0.5, np.arange(100)
        >>> [round(value, 4) for value in paired_bootstrap(jax.random.key(0), ours, theirs)]
        [0.5, 0.5, 0.5, 0.0001]

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16.
    """
    first, second = _pairs(first, second)
    n = len(first)
    return bootstrap(
        key,
        (first - second)[:, None],
        lambda sums: sums[:, 0] / n,
        resamples=resamples,
        confidence=confidence,
    )


def bootstrap(
    key: Key,
    rows: npt.ArrayLike,
    difference: Callable[[npt.NDArray[np.float64]], npt.ArrayLike],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """A difference that follows from sums over the examples, such as of two networks' F1.

    Args:
        key: PRNG key.
        rows: `[N, S]`, what each example adds to the sums.
        difference: `difference(sums [R, S]) -> [R]`, of R sets of examples at once.
        resamples: as for `paired_bootstrap`.
        confidence: as for `paired_bootstrap`.

    Returns:
        As `paired_bootstrap` does. NaN, all but the estimate, where the difference is not finite.

    Example:
        >>> of_two = np.array([[1, 0], [1, 1], [0, 0], [1, 0]])  # who is right on which example
        >>> bootstrap(jax.random.key(0), of_two, lambda sums: (sums[:, 0] - sums[:, 1]) / 4)[:3]
        (0.5, 0.0, 1.0)
    """
    rows = np.asarray(rows, np.float64)
    n, (distinct, counts) = len(rows), np.unique(rows, axis=0, return_counts=True)
    # How often each distinct row is drawn is multinomial, which is the bootstrap itself, and quick
    # where there are few: the differences between two classifiers' hits are no more than three.
    few = 8 * len(distinct) <= n
    rows, counts = (distinct, counts) if few else (rows, np.ones(n, int))
    estimate = float(np.asarray(difference(counts[None] @ rows))[0])
    if not np.isfinite(estimate):
        return Difference(estimate, np.nan, np.nan, np.nan)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    parts = []
    for start in range(0, resamples, step := max(1, _BLOCK // len(rows))):
        size = min(step, resamples - start)
        if few:
            drawn = rng.multinomial(n, counts / n, size=size)
        else:
            places = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
            drawn = np.bincount(places.ravel(), minlength=n * size).reshape(size, n)
        parts.append(np.asarray(difference(drawn.astype(np.float64) @ rows), np.float64))
    resampled, tail = np.concatenate(parts), (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    # The margin keeps equal numbers equal that were summed in another order.
    extreme = np.abs(resampled - estimate) >= abs(estimate) * (1 - 1e-9)
    p_value = (1 + extreme.sum()) / (resamples + 1)
    return Difference(estimate, float(low), float(high), float(p_value))


def paired_t(first: npt.ArrayLike, second: npt.ArrayLike, confidence: float = 0.95) -> Difference:
    """One figure for each seed of two methods, paired by seed: the paired t-test.

    Args:
        first: `[S]`, of the first method.
        second: `[S]`, of the second, in the same order of seeds.
        confidence: nominal coverage of the interval.

    Returns:
        The mean difference; with one seed, interval and p-value are NaN.

    Raises:
        DataError: the two are not of the same length, or empty.

    Example:
        >>> one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
        >>> two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
        >>> [round(value, 6) for value in paired_t(one, two)]
        [-1.58, -2.459886, -0.700114, 0.002833]

    Source: Student, Biometrika 6 (1908), from where the example is.
    """
    first, second = _pairs(first, second)
    values, mean = first - second, float((first - second).mean())
    if len(values) < 2:
        return Difference(mean, np.nan, np.nan, np.nan)
    if np.ptp(values) <= 1e-12 * np.abs(values).max():  # all the same but for rounding
        return Difference(mean, mean, mean, float(mean == 0))
    found = stats.ttest_rel(first, second)
    low, high = map(float, found.confidence_interval(confidence))
    return Difference(mean, low, high, float(found.pvalue))


def mean_interval(values: npt.ArrayLike, confidence: float = 0.95) -> Interval:
    """The mean of one figure over seeds, with Student's interval.

    Args:
        values: `[S]`.
        confidence: nominal coverage.

    Returns:
        The mean; with one seed, the interval is NaN.

    Raises:
        DataError: there are no values.

    Example:
        >>> [round(value, 3) for value in mean_interval([0.7, 0.8, 0.9])]
        [0.8, 0.552, 1.048]
    """
    array = np.asarray(values, np.float64)
    if not array.size:
        raise DataError("there is nothing to take the mean of")
    return Interval(*paired_t(array, np.zeros_like(array), confidence)[:3])


def holm(p_values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Adjusts p-values so that the chance of any false alarm among them keeps its level.

    Args:
        p_values: `[M]`, one for each question asked; NaN where there was none.

    Returns:
        `[M]`, to be read like single p-values; NaN stays, and does not count.

    Example:
        >>> holm([0.01, 0.04, 0.03, 0.005]).round(3).tolist()
        [0.03, 0.06, 0.06, 0.02]

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values)[: np.isfinite(values).sum()]  # NaN is sorted to the end
    adjusted = np.full_like(values, np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1)
    return adjusted


def _pairs(first: Any, second: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise DataError(
            f"the figures to compare have shapes {list(first.shape)} and {list(second.shape)}: "
            "pairs are needed, at least one"
        )
    return first, second
