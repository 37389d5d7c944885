"""Who predicted what for each test image: the arrays that paired tests need, and no model.

A run stores them beside `results.json` as `predictions.npz`, so that any two of its networks, and
networks of two runs that share a test set, can be compared image by image long afterwards.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megajax.errors import WorkdirError
from megajax.io import write_bytes

__all__ = [
    "PREDICTIONS",
    "Predictions",
    "by_id",
    "correct",
    "from_logits",
    "load_predictions",
    "same_examples",
    "save_predictions",
]

PREDICTIONS = "predictions.npz"


class Predictions(NamedTuple):
    """What M networks said about N test images.

    Attributes:
        names: M names, the keys of `megajax.evaluation.results.entries`.
        classes: int32 `[M, N]`, the predicted class; -1 where the logits were not finite.
        labels: int32 `[N]`, the true class.
        ids: int32 `[N]`, the number of each image in its source, or None.
        scores: float32 `[M, n]`, for each corrupted image the share of corruptions and severities
            under which a network was right, or None; see `megajax.evaluation.robustness`.
    """

    names: tuple[str, ...]
    classes: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32] | None = None
    scores: npt.NDArray[np.float32] | None = None


def from_logits(
    logits: Mapping[str, npt.NDArray[Any]],
    labels: npt.ArrayLike,
    ids: npt.ArrayLike | None = None,
    scores: npt.NDArray[np.float32] | None = None,
) -> Predictions:
    """The predictions of networks by name.

    Args:
        logits: name -> `[N, C]`.
        labels: `[N]`.
        ids: `[N]`, or None.
        scores: `[M, n]` in the order of `logits`, or None.

    Returns:
        The predictions.

    Example:
        >>> logits = {"merged": np.array([[0.0, 1.0], [np.nan, 1.0]])}
        >>> from_logits(logits, [1, 1]).classes.tolist()
        [[1, -1]]
    """
    classes = [
        np.where(np.isfinite(of_one).all(axis=-1), of_one.argmax(axis=-1), -1)
        for of_one in map(np.asarray, logits.values())
    ]
    return Predictions(
        tuple(logits),
        np.stack(classes).astype(np.int32),
        np.asarray(labels, np.int32),
        None if ids is None else np.asarray(ids, np.int32),
        scores,
    )


def correct(predictions: Predictions, name: str) -> npt.NDArray[np.bool_]:
    """Which test images a network got right: bool `[N]`.

    Example:
        >>> correct(from_logits({"merged": np.eye(2)}, [0, 0]), "merged").tolist()
        [True, False]
    """
    return predictions.classes[predictions.names.index(name)] == predictions.labels


def by_id(predictions: Predictions) -> Predictions:
    """The same in the order of the images' numbers, without scores; as it is if there are none.

    Example:
        >>> by_id(from_logits({"merged": np.eye(2)}, [3, 4], ids=[7, 5])).labels.tolist()
        [4, 3]
    """
    if predictions.ids is None:
        return predictions
    order = np.argsort(predictions.ids, kind="stable")
    return Predictions(
        predictions.names,
        predictions.classes[:, order],
        predictions.labels[order],
        predictions.ids[order],
    )


def same_examples(first: Predictions, second: Predictions) -> bool:
    """Whether two runs were tested on the same images in the same order, so that they pair up.

    Runs of one data set with different seeds may hold the same test images in another order: see
    `by_id`.

    Example:
        >>> one = from_logits({"merged": np.eye(2)}, [0, 1], ids=[5, 7])
        >>> same_examples(one, one), same_examples(one, one._replace(ids=np.array([5, 8])))
        (True, False)
    """
    if (first.ids is None) != (second.ids is None):
        return False
    ids = first.ids is None or np.array_equal(first.ids, np.asarray(second.ids))
    return ids and np.array_equal(first.labels, second.labels)


def save_predictions(folder: Path, predictions: Predictions) -> None:
    """Writes `predictions.npz` into a workdir.

    Raises:
        WorkdirError: it cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_predictions(folder, from_logits({"merged": np.eye(2)}, [0, 1]))
        >>> load_predictions(folder).names
        ('merged',)
    """
    known = {name: value for name, value in predictions._asdict().items() if value is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **known)
    write_bytes(folder / PREDICTIONS, buffer.getvalue())


def load_predictions(folder: Path) -> Predictions | None:
    """Reads a workdir's `predictions.npz`.

    Returns:
        The predictions; None where the run stored none.

    Raises:
        WorkdirError: the file cannot be read or is damaged.
    """
    path = folder / PREDICTIONS
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        found = Predictions(**arrays | {"names": tuple(arrays["names"].tolist())})
        if found.classes.shape != (len(found.names), len(found.labels)):
            raise ValueError(f"classes have shape {list(found.classes.shape)}")
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WorkdirError(f"{path} is damaged: {error}") from None
    return found
