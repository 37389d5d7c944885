"""Every network's figures in the form of `results.json`: what a run measures after its search.

Knows networks only as one function from images to everybody's logits
(`megajax.evaluation.measures.predictor`). This is where the test images are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megajax.evaluation.measures import measure
from megajax.evaluation.predictions import Predictions, from_logits
from megajax.evaluation.robustness import (
    Images,
    RobustnessConfig,
    Source,
    agreement,
    calibration_error,
    measure_robustness,
    on_the_fly,
)
from megajax.types import Key
from megajax.zoo.data import DataConfig, Dataset, load_part

__all__ = ["Measured", "measure_networks", "published"]


class Measured(NamedTuple):
    """What was measured.

    Attributes:
        entries: name of a network -> its entry; see `megajax.evaluation.results`.
        robustness: the entry `robustness`, or None where it was not asked for.
        predictions: who predicted what for the test images.
    """

    entries: dict[str, dict[str, Any]]
    robustness: dict[str, Any] | None
    predictions: Predictions


def measure_networks(
    key: Key,
    logits_of: Callable[[Any], Mapping[str, npt.NDArray[Any]]],
    dataset: Dataset,
    robustness: RobustnessConfig | None = None,
    data: DataConfig | None = None,
) -> Measured:
    """Measures all networks of a run on validation, test and corrupted test images.

    Args:
        key: PRNG key of the corruptions.
        logits_of: `logits_of(images)` gives each network's logits `[N, C]` by name, the parents as
            `parent_0`, `parent_1` and so on.
        dataset: the images.
        robustness: on which corruptions; None takes the defaults.
        data: where the published corruptions are; None takes the defaults.

    Returns:
        The figures.

    Raises:
        DataError: corrupted images that cannot be had.

    Example:
        >>> import jax
        >>> from megajax.zoo.data import load
        >>> dataset = load(0, DataConfig(limit=20))
        >>> def logits_of(images):
        ...     return {"parent_0": np.tile(np.eye(10)[3], (len(images), 1))}
        >>> measured = measure_networks(jax.random.key(0), logits_of, dataset)
        >>> measured.entries["parent_0"]["per_class_accuracy"][3]
        1.0
    """
    config = robustness or RobustnessConfig()
    validation, test = logits_of(dataset.validation.images), logits_of(dataset.test.images)
    table, scores = None, None
    if config.enabled:
        unit = dataset.test.images * dataset.std + dataset.mean
        source = (
            published(data, config.examples)
            if config.published
            else on_the_fly(key, unit, dataset.test.labels, config.examples)
        )
        found = measure_robustness(source, logits_of, config, mean=dataset.mean, std=dataset.std)
        table, scores = found._asdict(), found.scores
        del table["scores"]
        table["published"] = config.published
    predictions = from_logits(test, dataset.test.labels, dataset.test.ids, scores)
    parents = [i for i, name in enumerate(predictions.names) if name.startswith("parent_")]
    entries = {}
    for name, classes in zip(predictions.names, predictions.classes, strict=True):
        on_validation = measure(validation[name], dataset.validation.labels)
        on_test = measure(test[name], dataset.test.labels)
        entries[name] = {
            "validation_accuracy": on_validation.accuracy,
            "validation_nll": on_validation.nll,
            "test_accuracy": on_test.accuracy,
            "test_nll": on_test.nll,
            "calibration_error": calibration_error(test[name], dataset.test.labels),
            "per_class_accuracy": _per_class(classes, dataset.test.labels, dataset.num_classes),
            "agreement": [agreement(classes, predictions.classes[i]) for i in parents],
        }
    return Measured(entries, table, predictions)


def _per_class(
    classes: npt.NDArray[Any], labels: npt.NDArray[Any], num_classes: int
) -> list[float | None]:
    """The accuracy for each class; None where it has no image."""
    there = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels[classes == labels], minlength=num_classes)
    return [float(r / n) if n else None for r, n in zip(right, there, strict=True)]


def published(data: DataConfig | None = None, examples: int | None = None) -> Source:
    """CIFAR-10-C as published, from prepared TFDS sets `cifar10_corrupted/NAME_SEVERITY`.

    Each pair of corruption and severity is a set of its own, prepared once by
    `python -m megajax.data prepare cifar10_corrupted/fog_3`.

    Args:
        data: its `data_dir` and `image_size` count; None takes the defaults.
        examples: takes so many of the first images; None takes all 10,000.

    Returns:
        The source; it raises DataError for a set that is not prepared, and says how to do that.

    Example:
        >>> import tempfile
        >>> published(DataConfig(data_dir=tempfile.mkdtemp()))("fog", 3)
        Traceback (most recent call last):
        ...
        megajax.errors.DataError: cifar10_corrupted/fog_3 is not prepared; run once: ...
    """
    config = data or DataConfig()

    def source(name: str, severity: int) -> tuple[Images, npt.NDArray[Any]]:
        of_pair = config.replace(name=f"cifar10_corrupted/{name}_{severity}")
        split = load_part(of_pair, "test")
        return split.images[:examples], split.labels[:examples]

    return source
