"""Held-out metrics of single networks: predictions on the device, figures in NumPy float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np

from megajax.entry import output_shapes
from megajax.errors import DataError
from megajax.evaluation.batches import cut
from megajax.program.batchnorm import recalibrate
from megajax.types import ApplyFn, PyTree

__all__ = [
    "IGNORED",
    "Kind",
    "Metrics",
    "mean_prediction",
    "measure",
    "predict",
    "predictor",
    "straight_path",
]

Kind: TypeAlias = Literal["classes", "yes_or_no", "values"]
"""What outputs stand for: logits of classes, logits of yes or no, or the values themselves."""


IGNORED = -100
"""The label of a position that does not count."""

TENTHS = tuple(i / 10 for i in range(11))


class Metrics(NamedTuple):
    """How well predictions fit the labels.

    Attributes:
        accuracy: share of examples whose largest logit is the label's.
        nll: mean negative log-likelihood, in nats.
    """

    accuracy: float
    nll: float


def predict(apply_fn: ApplyFn, variables: PyTree, inputs: PyTree, batch_size: int = 512) -> PyTree:
    """The outputs of one network for any number of examples; compiled once for all networks.

    Args:
        apply_fn: the network.
        variables: its variables.
        inputs: leaves `[N, ...]`, N >= 1.
        batch_size: the largest batch to run.

    Returns:
        The outputs, NumPy, leaves `[N, ...]`; half precision becomes float32.

    Raises:
        DataError: there are no examples, or the network does not take them.

    Example:
        >>> predict(lambda w, x: x * w, 2.0, np.ones((3, 2)), batch_size=2).shape
        (3, 2)
    """
    leaves = jax.tree.leaves(inputs)
    if not leaves or not np.ndim(leaves[0]) or not len(leaves[0]):
        raise DataError("there are no examples to predict")
    count = len(leaves[0])
    batches = cut(inputs, None, batch_size).inputs
    try:
        outputs = _outputs(apply_fn, variables, batches)
    except Exception:  # of the network itself, or of what it is given
        output_shapes(apply_fn, variables, jax.tree.map(lambda leaf: leaf[0], batches))
        raise

    def whole(leaf: jax.Array) -> np.ndarray:
        array = np.asarray(leaf).reshape(-1, *leaf.shape[2:])[:count]
        half = array.dtype.itemsize < 4 and jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
        return array.astype(np.float32) if half else array

    return jax.tree.map(whole, outputs)


@partial(jax.jit, static_argnums=0)
def _outputs(apply_fn: ApplyFn, variables: PyTree, batches: PyTree) -> PyTree:
    return jax.lax.map(partial(apply_fn, variables), batches)


def measure(logits: np.ndarray, labels: np.ndarray) -> Metrics:
    """Accuracy and negative log-likelihood.

    Args:
        logits: `[N, ..., C]`; log-probabilities (an ensemble's) serve as well.
        labels: `[N, ...]` integers, `IGNORED` where a position does not count.

    Returns:
        The metrics, computed in float64: means over the examples of the means over an example's
        positions. A position with NaN or plus infinity among its logits is wrong; minus infinity
        switches a class off.

    Raises:
        DataError: there is not one label for each row of logits.

    Example:
        >>> measure(np.array([[5.0, 0.0], [5.0, 0.0]]), np.array([0, 1])).accuracy
        0.5
    """
    labels = np.asarray(labels)
    if labels.shape != np.shape(logits)[:-1]:
        raise DataError(
            f"labels have shape {list(labels.shape)}, logits {list(np.shape(logits))}: one label "
            "for each row of logits is needed"
        )
    counts = labels != IGNORED
    true = np.where(counts, labels, 0)
    right = (logits.argmax(axis=-1) == true) & (logits < np.inf).all(axis=-1)
    nll = -np.take_along_axis(_log_softmax(logits), true[..., None], axis=-1)[..., 0]
    return Metrics(*(_mean_of_examples(figures, counts) for figures in (right, nll)))


def _mean_of_examples(figures: np.ndarray, counts: np.ndarray) -> float:
    """The mean over the examples of the mean over those of its positions that count."""
    rows = counts.reshape(len(counts), -1)
    totals, there = np.where(counts, figures, 0).reshape(rows.shape).sum(axis=1), rows.sum(axis=1)
    return float((totals[there > 0] / there[there > 0]).mean())


def straight_path(
    apply_fn: ApplyFn,
    first: PyTree,
    second: PyTree,
    images: Any,
    labels: Any,
    *,
    shares: Sequence[float] = TENTHS,
    calibration: PyTree | None = None,
    statistics: tuple[tuple[str, str], ...] = (),
    batch_size: int = 512,
) -> list[Metrics]:
    """The metrics of the networks on the straight line between two.

    Args:
        apply_fn: the network.
        first: variables at share 0.
        second: variables at share 1.
        images: `[N, ...]`.
        labels: `[N]`.
        shares: of the second network, from 0 to 1.
        calibration: inputs that the BatchNorm statistics of every network that is neither end are
            measured on; None leaves them as they are mixed.
        statistics: as for `megajax.recalibrate`.
        batch_size: the largest batch to run.

    Returns:
        The metrics at each share.

    Example:
        >>> data = np.eye(2, dtype=np.float32), np.arange(2)
        >>> path = straight_path(lambda w, x: x @ w, np.eye(2), -np.eye(2), *data)
        >>> path[0].accuracy, path[10].accuracy
        (1.0, 0.0)
    """
    path = []
    for share in shares:
        network = first if share == 0 else second
        if share not in (0, 1):
            network = _between(apply_fn, statistics, first, second, np.float32(share), calibration)
        path.append(measure(predict(apply_fn, network, images, batch_size), labels))
    return path


@partial(jax.jit, static_argnums=(0, 1))
def _between(
    apply_fn: ApplyFn,
    statistics: tuple[tuple[str, str], ...],
    first: PyTree,
    second: PyTree,
    share: Any,
    calibration: PyTree | None,
) -> PyTree:
    mixed = jax.tree.map(lambda a, b: (1 - share) * a + share * b, first, second)
    return mixed if calibration is None else recalibrate(apply_fn, mixed, calibration, statistics)


def mean_prediction(outputs: PyTree, kind: Kind = "classes") -> PyTree:
    """What networks predict on average: the mean of what their outputs stand for.

    Args:
        outputs: leaves `[K, N, ...]` of K networks; logits are one array, with the classes last.
        kind: of the outputs.

    Returns:
        Outputs of the same kind, leaves `[N, ...]` float64: the log of the mean probabilities, the
        log-odds of the mean probability, or the mean value.

    Example:
        >>> np.exp(mean_prediction(np.log([[[0.9, 0.1]], [[0.5, 0.5]]]))).round(3).tolist()
        [[0.7, 0.3]]
    """
    if kind == "values":
        return jax.tree.map(
            lambda leaf: np.mean(leaf, 0, np.result_type(leaf, np.float64)), outputs
        )
    if kind == "yes_or_no":  # two classes, of which "no" has a logit of 0
        both = mean_prediction(np.stack([outputs, np.zeros_like(outputs)], axis=-1))
        return both[..., 0] - both[..., 1]
    return np.logaddexp.reduce(_log_softmax(outputs), axis=0) - np.log(len(outputs))


def predictor(
    apply_fn: ApplyFn,
    networks: Mapping[str, PyTree],
    ensembles: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 512,
) -> Callable[[Any], dict[str, np.ndarray]]:
    """All networks of a comparison as one function of the images, by name.

    Args:
        apply_fn: the architecture of them all.
        networks: name -> variables.
        ensembles: name of an ensemble -> names of the networks whose probabilities it averages.
        batch_size: the largest batch to run.

    Returns:
        `logits_of(images [N, ...])` gives name -> logits `[N, C]`, networks before ensembles.

    Example:
        >>> logits_of = predictor(lambda w, x: x * w, {"a": 1.0, "b": -1.0}, {"both": ["a", "b"]})
        >>> {name: logits.shape for name, logits in logits_of(np.ones((3, 2))).items()}
        {'a': (3, 2), 'b': (3, 2), 'both': (3, 2)}
    """

    def logits_of(images: Any) -> dict[str, np.ndarray]:
        logits = {
            name: predict(apply_fn, variables, images, batch_size)
            for name, variables in networks.items()
        }
        for name, members in (ensembles or {}).items():
            logits[name] = mean_prediction(np.stack([logits[member] for member in members]))
        return logits

    return logits_of


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # infinite logits give what is no number
        shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
        result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
