"""Every network's figures in the form of `results.json`: what a run measures after its search.

Knows networks as one function from images to everybody's logits
(`megajax.evaluation.measures.predictor`) and, on tasks, by their variables. This is where the test
images are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from megajax.evaluation.measures import measure, predict
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
from megajax.merging.outputs import ensemble, score_difference
from megajax.merging.tasks import Task, counted, score_of
from megajax.types import Key, PyTree
from megajax.zoo.data import DataConfig, Dataset, load_part

__all__ = ["Measured", "measure_networks", "measure_task", "published"]


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
        table = found._asdict() | {"published": config.published}
        scores = table.pop("scores")
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


def measure_task(key: Key, task: Task, networks: Mapping[str, PyTree], best: str) -> dict[str, Any]:
    """Everybody's score on a task, and by how much it exceeds that of the best parent.

    Args:
        key: PRNG key of the bootstrap.
        task: from `megajax.merging.tasks.check_task`, on test examples.
        networks: name -> variables, the parents as `parent_0`, `parent_1` and so on.
        best: name of the best parent.

    Returns:
        The entry `test` of a task; see `megajax.evaluation.results`. The parents' ensemble is there
        too, where the metric says what it averages.

    Example:
        >>> from megajax.merging.tasks import check_task
        >>> def apply_fn(w, x):
        ...     return w * x
        >>> x = np.arange(1.0, 21.0)
        >>> task = check_task(Task(x, x, "r2"), apply_fn, 1.0)
        >>> networks = {"parent_0": 0.5, "parent_1": 1.5, "merged": 1.0}
        >>> found = measure_task(jax.random.key(0), task, networks, "parent_0")["networks"]
        >>> {name: round(entry["score"], 2) for name, entry in found.items()}
        {'parent_0': -0.08, 'parent_1': -0.08, 'merged': 1.0, 'ensemble': 1.0}
        >>> found["merged"]["difference"]["low"] > 0
        True
    """
    assert task.apply_fn is not None
    outputs = {name: predict(task.apply_fn, one, task.inputs) for name, one in networks.items()}
    if task.metric.kind is not None:
        parents = [one for name, one in outputs.items() if name.startswith("parent_")]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *parents)
        outputs["ensemble"] = ensemble(stacked, task.metric)
    found: dict[str, dict[str, Any]] = {}
    for name, of_one in outputs.items():
        found[name] = {"score": score_of(task, of_one)}
        if name != best:
            difference = score_difference(key, of_one, outputs[best], task.targets, task.metric)
            found[name]["difference"] = difference._asdict()
    return {"examples": int(counted(task).sum()), "best": best, "networks": found}


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
