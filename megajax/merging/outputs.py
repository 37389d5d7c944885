"""What networks' outputs say together, and against each other, by the metric of their task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from megajax.errors import ConfigError, DataError
from megajax.evaluation.measures import mean_prediction
from megajax.evaluation.statistics import Difference, bootstrap
from megajax.keys import as_key
from megajax.merging.metrics import Metric, as_metric
from megajax.merging.tasks import Task, checked_metric, counted
from megajax.types import Key, PyTree

__all__ = ["ensemble", "score_difference"]


def ensemble(outputs: PyTree, metric: Any = "cross_entropy") -> PyTree:
    """The networks' mean prediction: the ceiling of what they know, at K times the cost.

    What is averaged follows from the metric that the outputs are for: the class probabilities for
    metrics of classes (cross-entropy, accuracy, F1 and so on), the probability of "yes" (sigmoid)
    for binary ones, and the outputs themselves for regression. `Metric.kind` says which it is.

    Args:
        outputs: leaves `[K, N, ...]` of K networks.
        metric: of the task: a name in `megajax.merging.metrics.METRICS` or a `Metric`.

    Returns:
        Outputs that the metric takes, leaves `[N, ...]` float64: log-probabilities, log-odds or
        values.

    Raises:
        ConfigError: the metric does not say what outputs stand for.

    Example:
        >>> np.exp(ensemble(np.log([[[0.9, 0.1]], [[0.5, 0.5]]]))).round(3).tolist()
        [[0.7, 0.3]]
        >>> ensemble(np.array([[1.0, 2.0], [3.0, 2.0]]), "mean_squared_error").tolist()
        [2.0, 2.0]
    """
    metric = as_metric(metric)
    if metric.kind is None:
        raise ConfigError(
            f"metric {metric.name} does not say what outputs stand for, so nothing follows on how "
            "to average them: give a Metric with kind='classes', 'yes_or_no' or 'values'"
        )
    return mean_prediction(outputs, metric.kind)


def score_difference(
    key: Key | int,
    first: PyTree,
    second: PyTree,
    targets: PyTree,
    metric: Any = None,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """By how much one network's score exceeds another's on the same examples, and how sure that is.

    The examples are drawn anew many times, with all that either network makes of them, and the
    metric is computed on each draw: so it holds for metrics of the whole set (F1, R2, perplexity)
    as for means over the examples.

    Args:
        key: PRNG key, or a whole number.
        first: outputs of a network, leaves `[N, ...]`; see `megajax.predict` and `ensemble`.
        second: of the other one, alike.
        targets: leaves `[N, ...]`, as in `megajax.Task`.
        metric: as in `megajax.Task`; None follows from the targets.
        resamples: how many times N examples are drawn with replacement.
        confidence: nominal coverage of the percentile interval.

    Returns:
        First minus second. The p-value is that of `megajax.evaluation.statistics.paired_bootstrap`.
        All but the estimate is NaN where that is not finite.

    Raises:
        DataError: the outputs do not fit together, or do not fit the targets.
        ConfigError: the metric does not take them.

    Example:
        >>> targets = np.arange(100.0)
        >>> found = score_difference(0, targets, targets + 1, targets)  # mean squared errors
        >>> [round(value, 4) for value in found]
        [1.0, 1.0, 1.0, 0.0001]

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16.
    """
    given = [jax.tree.map(np.shape, one) for one in (first, second)]
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((first, second, targets))}
    if given[0] != given[1] or len(lengths) != 1 or lengths <= {(), (0,)}:
        raise DataError(
            f"outputs of shapes {given[0]} and {given[1]} and targets of "
            f"{jax.tree.map(np.shape, targets)}: two alike are needed, with an entry for each "
            "example"
        )
    first, second, targets = jax.tree.map(np.asarray, (first, second, targets))
    metric = checked_metric(metric, first, targets, "the task")
    there = counted(Task(first, targets))
    sides = [metric.statistics(one, targets) for one in (first, second)]
    leaves, treedef = jax.tree.flatten(jax.tree.map(lambda leaf: np.asarray(leaf)[there], sides))
    count, shapes = int(there.sum()), tuple(leaf.shape[1:] for leaf in leaves)

    def difference(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        with jax.enable_x64(True):  # else ties between discrete scores would be rounded away
            return np.asarray(_differences(sums, metric, treedef, shapes, count))

    rows = np.concatenate([leaf.reshape(count, -1) for leaf in leaves], axis=1)
    key = as_key(key)
    return bootstrap(key, rows, difference, resamples=resamples, confidence=confidence)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _differences(
    sums: jax.Array, metric: Metric, treedef: Any, shapes: Sequence[tuple[int, ...]], count: int
) -> jax.Array:
    """First minus second, of sums `[R, S]` of both networks' statistics side by side."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(sums, ends[:-1], axis=1)
    totals = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def score(total: PyTree) -> jax.Array:
        return total / count if metric.finish is None else metric.finish(total, count)

    first, second = jax.tree.unflatten(treedef, totals)
    return jax.vmap(score)(first) - jax.vmap(score)(second)
