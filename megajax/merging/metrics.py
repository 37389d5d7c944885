"""Metrics: what an output is worth beside its target. All of them are maximised.

Knows outputs and targets, batch by batch; nothing of networks or populations. A metric is the mean
of a score over the examples or, where that is not what it means (F1, R2, perplexity), sums over the
examples and what follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from megajax.errors import ConfigError, DataError
from megajax.evaluation.measures import IGNORED, Kind
from megajax.trees import told
from megajax.types import PyTree, bind

__all__ = [
    "IGNORED",
    "METRICS",
    "Metric",
    "accuracy",
    "as_metric",
    "binary_accuracy",
    "binary_cross_entropy",
    "calibrated_cross_entropy",
    "cross_entropy",
    "default_metric",
    "distill",
    "macro_f1",
    "mean_absolute_error",
    "mean_squared_error",
    "perplexity",
    "r2",
]

Statistics: TypeAlias = Callable[[Any, Any], PyTree]


@dataclass(frozen=True)
class Metric:
    """A metric as sums over examples: `finish(sum of statistics, number of examples)`.

    Attributes:
        statistics: `statistics(outputs, targets) -> leaves [b, ...]`, one entry for each example.
            For a plain metric that is the score `[b]`.
        finish: `finish(sums, count) -> score`, a number; None is the mean of a plain metric.
        name: what the report calls it.
        smooth: the metric that stands for it where a gradient is needed; None is itself.
        kind: what it takes outputs for, which tells how those of several networks are averaged:
            `classes` (logits, `[b, ..., C]`), `yes_or_no` (a logit for each question) or `values`;
            None is not known. See `megajax.ensemble`.

    Example:
        >>> rmse = Metric(lambda y, t: (y - t) ** 2, lambda total, n: -jnp.sqrt(total / n))
        >>> squares = rmse.statistics(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]))
        >>> round(float(rmse.finish(squares.sum(), 2)), 3)
        -1.414
    """

    statistics: Statistics
    finish: Callable[[PyTree, Any], jax.Array] | None = None
    name: str = "own"
    smooth: Metric | None = None
    kind: Kind | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the mean of a score over the examples."""
        return self.finish is None

    def of(self, statistics: PyTree, valid: jax.Array) -> jax.Array:
        """The metric of statistics `[N, ...]`; entries that are not `valid` do not count."""

        def total(leaf: jax.Array) -> jax.Array:
            there = valid.reshape(valid.shape + (1,) * (leaf.ndim - valid.ndim))
            return jnp.where(there, leaf, 0).sum(axis=range(valid.ndim))

        count = valid.sum()
        sums = jax.tree.map(total, statistics)
        return sums / count if self.finish is None else self.finish(sums, count)


# Scores: one number for each example --------------------------------------------------------------


def accuracy(logits: jax.Array, targets: Any) -> jax.Array:
    """The share of an example's positions whose largest logit is the label's.

    Logits with NaN or plus infinity are never right; a class at minus infinity is switched off.

    Args:
        logits: `[b, ..., C]`.
        targets: labels `[b, ...]`, `IGNORED` where a position does not count; or a pair of labels
            and weights: of the positions, or `[b]`, which `METRICS` takes a weighted mean with.

    Returns:
        `[b]` float32, in [0, 1].

    Example:
        >>> accuracy(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([1, 1])).tolist()
        [1.0, 0.0]
    """
    labels, weights = _positions(targets)
    sane = (logits < jnp.inf).all(axis=-1)  # false for NaN too
    return _mean(((jnp.argmax(logits, axis=-1) == labels) & sane).astype(jnp.float32), weights)


def cross_entropy(logits: jax.Array, targets: Any) -> jax.Array:
    """Log-probability of an example's labels in nats, mean over its positions; at most 0.

    Args:
        logits: `[b, ..., C]`.
        targets: as for `accuracy`.

    Returns:
        `[b]` float32: the negative cross-entropy.

    Example:
        >>> cross_entropy(jnp.zeros((1, 3, 2)), jnp.array([[0, 1, IGNORED]])).round(2)
        Array([-0.69], dtype=float32)
    """
    labels, weights = _positions(targets)
    return _mean(_log_likelihood(logits, labels), weights)


def binary_cross_entropy(logits: jax.Array, targets: Any) -> jax.Array:
    """Log-probability of yes-or-no targets in nats, mean over an example's outputs; at most 0.

    Args:
        logits: `[b]`, `[b, 1]` for one question, or `[b, ..., L]` for several labels.
        targets: 0, 1 or anything between, of the logits' shape (or `[b]` for `[b, 1]`); or a pair
            of these and weights.

    Returns:
        `[b]` float32.

    Example:
        >>> binary_cross_entropy(jnp.zeros((2, 1)), jnp.array([0, 1])).round(2)
        Array([-0.69, -0.69], dtype=float32)
    """
    wanted, weights = _like(logits, targets)
    loss = optax.losses.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), wanted)
    return _mean(-loss, weights)


def binary_accuracy(logits: jax.Array, targets: Any) -> jax.Array:
    """The share of an example's yes-or-no outputs whose logit has the right sign.

    Args:
        logits: as for `binary_cross_entropy`.
        targets: as for `binary_cross_entropy`.

    Returns:
        `[b]` float32, in [0, 1].

    Example:
        >>> binary_accuracy(jnp.array([[2.0, -1.0]]), jnp.array([[1, 1]])).tolist()
        [0.5]
    """
    wanted, weights = _like(logits, targets)
    right = ((logits > 0) == (wanted > 0.5)) & jnp.isfinite(logits)
    return _mean(right.astype(jnp.float32), weights)


def mean_squared_error(outputs: jax.Array, targets: Any) -> jax.Array:
    """Minus the mean squared difference of an example's outputs from its targets.

    Args:
        outputs: `[b, ...]`.
        targets: of the same shape (or `[b]` for `[b, 1]`); or a pair of these and weights, of the
            outputs or of the examples, as for `accuracy`.

    Returns:
        `[b]` float32, at most 0.

    Example:
        >>> mean_squared_error(jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 1.0]])).tolist()
        [-2.0]
    """
    wanted, weights = _like(outputs, targets)
    return _mean(-((outputs.astype(jnp.float32) - wanted) ** 2), weights)


def mean_absolute_error(outputs: jax.Array, targets: Any) -> jax.Array:
    """Minus the mean absolute difference of an example's outputs from its targets.

    Args:
        outputs: as for `mean_squared_error`.
        targets: as for `mean_squared_error`.

    Returns:
        `[b]` float32, at most 0.

    Example:
        >>> mean_absolute_error(jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 1.0]])).tolist()
        [-1.0]
    """
    wanted, weights = _like(outputs, targets)
    return _mean(-abs(outputs.astype(jnp.float32) - wanted), weights)


def distill(logits: jax.Array, targets: Any) -> jax.Array:
    """Minus the Kullback-Leibler divergence to given probabilities, in nats; at most 0.

    Label-free: the targets are the mean of the parents' predictions, see `megajax.merge`.

    Args:
        logits: `[b, ..., C]`.
        targets: probabilities of the same shape, or a pair of these and weights as for `accuracy`.

    Returns:
        `[b]` float32, mean over an example's positions.

    Example:
        >>> distill(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])).round(2)
        Array([-0.69], dtype=float32)
    """
    wanted, weights = _parts(targets)
    _check_shape(wanted, (logits.shape,))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    gaps = jnp.where(wanted > 0, wanted * (jnp.log(jnp.maximum(wanted, 1e-38)) - log_q), 0.0)
    if weights is not None:
        weights = _spread(weights, logits.ndim - 1)
    return _mean(-gaps.sum(axis=-1), weights)


# Metrics of the whole set -------------------------------------------------------------------------


def _averaged(score: Statistics, kind: Kind, smooth: Metric | None = None) -> Metric:
    """The mean of a score over the examples, by their weights where the targets have any."""
    name = getattr(score, "__name__", "own")
    return Metric(bind(_weighted_score, score=score), _weighted_mean, name, smooth, kind)


def _weighted_score(outputs: Any, targets: Any, *, score: Statistics) -> PyTree:
    """Scores `[b, ...]` times the weights of their examples, and those weights `[b]`.

    Weights of positions count within an example; the example itself then counts as one, or not at
    all if none of its positions does.
    """
    scores = score(outputs, targets)
    _, weights = _parts(targets)
    if weights is None:
        share = jnp.ones(scores.shape[0])
    elif weights.size == weights.shape[0]:
        share = weights.reshape(-1).astype(jnp.float32)
    else:
        share = (weights > 0).any(axis=range(1, weights.ndim)).astype(jnp.float32)
    spread = _spread(share, scores.ndim)
    return jnp.where(spread > 0, scores * spread, 0.0), share


def _weighted_mean(sums: PyTree, count: Any) -> jax.Array:
    del count
    return sums[0] / sums[1]


def _perplexity_statistics(logits: jax.Array, targets: Any) -> PyTree:
    labels, weights = _positions(targets)
    of_example = tuple(range(1, labels.ndim))
    told = jnp.where(weights > 0, _log_likelihood(logits, labels), 0.0)
    return (told * weights).sum(axis=of_example), weights.sum(axis=of_example)


def _f1_statistics(logits: jax.Array, targets: Any) -> PyTree:
    labels, weights = _positions(targets)
    classes = logits.shape[-1]
    of_example = tuple(range(1, labels.ndim))
    sane = (logits < jnp.inf).all(axis=-1, keepdims=True)
    told = jnp.where(sane, jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes), 0)
    true = jax.nn.one_hot(labels, classes)
    both = (told * true, told, true)
    return tuple((weights[..., None] * one).sum(axis=of_example) for one in both)


def _f1(sums: PyTree, count: Any) -> jax.Array:
    del count
    hits, told, true = sums
    there = told + true > 0
    scores = jnp.where(there, 2 * hits / jnp.maximum(told + true, 1e-38), 0.0)
    return scores.sum() / jnp.maximum(there.sum(dtype=scores.dtype), 1)


def _r2_statistics(outputs: jax.Array, targets: Any) -> PyTree:
    wanted, weights = _like(outputs, targets)
    of_example = tuple(range(1, outputs.ndim))
    error = (outputs.astype(jnp.float32) - wanted) ** 2
    return tuple((weights * one).sum(axis=of_example) for one in (error, wanted, wanted**2, 1.0))


def _r2(sums: PyTree, count: Any) -> jax.Array:
    del count
    error, total, squares, weight = sums
    # Far from zero the difference loses its digits; below zero it would turn the order around.
    spread = jnp.maximum(squares - total**2 / weight, 1e-6 * squares)
    return 1 - error / jnp.maximum(spread, np.finfo(np.float32).tiny)


_TEMPERATURES = np.geomspace(0.25, 8.0, 41).astype(np.float32)


def _at_temperatures(logits: jax.Array, targets: Any) -> jax.Array:
    """The cross-entropy at each temperature, `[b, T]`."""
    labels, weights = _positions(targets)
    wide = logits.astype(jnp.float32)
    scores: jax.Array = jax.lax.map(
        lambda t: _mean(_log_likelihood(wide / t, labels), weights), jnp.asarray(_TEMPERATURES)
    )
    return scores.T


perplexity = Metric(
    _perplexity_statistics,
    lambda sums, count: -jnp.exp(-sums[0] / sums[1]),
    "perplexity",
    kind="classes",
)
"""Minus the perplexity: the exponential of the cross-entropy over all positions that count."""

macro_f1 = Metric(
    _f1_statistics, _f1, "macro_f1", _averaged(cross_entropy, "classes"), kind="classes"
)
"""The mean over the classes of F1, classes that are neither predicted nor there left out
(scikit-learn's `f1_score(average="macro")`)."""

r2 = Metric(_r2_statistics, _r2, "r2", kind="values")
"""The share of the targets' variance that the outputs explain, all outputs taken together."""

calibrated_cross_entropy = Metric(
    bind(_weighted_score, score=_at_temperatures),
    lambda sums, count: _weighted_mean(sums, count).max(),
    "calibrated_cross_entropy",
    kind="classes",
)
"""The negative cross-entropy at the best of 41 temperatures from 1/4 to 8: what a network would
reach if one number were fitted to its logits (Guo et al., arXiv 1706.04599)."""

METRICS: dict[str, Metric] = {
    "cross_entropy": _averaged(cross_entropy, "classes"),
    "accuracy": _averaged(accuracy, "classes", _averaged(cross_entropy, "classes")),
    "binary_cross_entropy": _averaged(binary_cross_entropy, "yes_or_no"),
    "binary_accuracy": _averaged(
        binary_accuracy, "yes_or_no", _averaged(binary_cross_entropy, "yes_or_no")
    ),
    "mean_squared_error": _averaged(mean_squared_error, "values"),
    "mean_absolute_error": _averaged(mean_absolute_error, "values"),
    "r2": r2,
    "perplexity": perplexity,
    "macro_f1": macro_f1,
    "calibrated_cross_entropy": calibrated_cross_entropy,
    "distill": _averaged(distill, "classes"),
}
"""The metrics by the names that the configuration gives them. Where targets are a pair of wanted
values and weights, means over the examples are weighted."""


def as_metric(metric: Any) -> Metric:
    """A metric from its name, a function `(outputs, targets) -> scores [b]`, or a `Metric`.

    Raises:
        ConfigError: there is no metric of this name, or it is none of these.

    Example:
        >>> as_metric("accuracy").name
        'accuracy'
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ConfigError(f"metric is {metric!r}: choose one of {', '.join(METRICS)}")
        return METRICS[metric]
    if callable(metric):
        return Metric(metric, name=getattr(metric, "__name__", type(metric).__name__))
    raise ConfigError(f"metric is {metric!r}: a name, a function or a Metric is needed")


def default_metric(outputs: PyTree, targets: PyTree) -> str:
    """The metric that the targets' type and shape ask for.

    Args:
        outputs: shapes and dtypes of a batch of outputs.
        targets: a batch of targets, or shapes and dtypes.

    Returns:
        `cross_entropy` for whole numbers with one axis less than the outputs,
        `binary_cross_entropy` for yes or no (booleans, or whole numbers of the outputs' shape),
        `mean_squared_error` for real numbers of the outputs' shape.

    Raises:
        DataError: none of these fits.

    Example:
        >>> default_metric(np.zeros((5, 3)), np.zeros(5, int))
        'cross_entropy'
        >>> default_metric(np.zeros((5, 3)), np.zeros((5, 3)))
        'mean_squared_error'
    """
    labels = targets[0] if isinstance(targets, tuple) and len(targets) == 2 else targets
    if all(hasattr(one, "shape") for one in (outputs, labels)):
        whole = np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool
        one_logit = outputs.shape == (*labels.shape, 1)
        if whole and (labels.shape == outputs.shape or one_logit):
            return "binary_cross_entropy"
        if whole and labels.dtype != bool and labels.shape == outputs.shape[:-1]:
            return "cross_entropy"
        if not whole and (labels.shape == outputs.shape or one_logit):
            return "mean_squared_error"
    raise DataError(
        f"no metric follows from outputs {told(outputs)} and targets {told(targets)}: name one"
    )


def _positions(targets: Any) -> tuple[jax.Array, jax.Array]:
    """Labels, and the weight of each position: 0 where it is ignored."""
    labels, weights = _parts(targets)
    labels = labels.astype(jnp.int32)  # in eight bits without sign, 156 is -100
    counts = labels != IGNORED
    if weights is None:
        weights = counts.astype(jnp.float32)
    weights = jnp.where(counts, _spread(weights, labels.ndim), 0.0)
    return jnp.where(counts, labels, 0), weights


def _like(outputs: jax.Array, targets: Any) -> tuple[jax.Array, jax.Array]:
    """Targets and weights of the outputs' shape."""
    wanted, weights = _parts(targets)
    _check_shape(wanted, (outputs.shape, outputs.shape[:-1] if outputs.shape[-1] == 1 else None))
    weights = jnp.ones(()) if weights is None else _spread(weights, outputs.ndim)
    return wanted.reshape(outputs.shape).astype(jnp.float32), jnp.broadcast_to(
        weights, outputs.shape
    )


def _parts(targets: Any) -> tuple[Any, Any]:
    """What is wanted, and weights or None."""
    return targets if isinstance(targets, tuple) else (targets, None)


def _spread(weights: jax.Array, ndim: int) -> jax.Array:
    """Appends axes of length one up to `ndim`."""
    return weights.reshape(weights.shape + (1,) * (ndim - weights.ndim))


def _check_shape(wanted: jax.Array, allowed: Sequence[tuple[int, ...] | None]) -> None:
    if wanted.shape not in allowed:
        raise ValueError(f"targets of shape {list(allowed[0] or ())} are needed")


def _log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    loss: jax.Array = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return -loss


def _mean(scores: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The weighted mean over the positions of each example; 0 where none of them counts."""
    if scores.ndim == 1 and weights is None:
        return scores
    axes = tuple(range(1, scores.ndim))
    if weights is None:
        return scores.mean(axis=axes)
    scores = jnp.where(weights > 0, scores, 0.0)
    total = weights.sum(axis=axes)
    mean = (scores * weights).sum(axis=axes) / jnp.where(total > 0, total, 1)
    return mean
