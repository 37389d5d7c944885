"""Tasks: what networks are scored on, checked on entry and cut into batches.

Knows inputs, targets and metrics; nothing of parents, genes or searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype

from megajax.entry import check_finite, check_inputs, output_shapes
from megajax.errors import ConfigError, DataError, first_line
from megajax.evaluation.batches import Batches, cut
from megajax.evaluation.measures import predict
from megajax.merging.metrics import (
    IGNORED,
    METRICS,
    Metric,
    as_metric,
    default_metric,
)
from megajax.trees import leaves_by_path, told
from megajax.types import ApplyFn, PyTree

__all__ = [
    "Batches",
    "Task",
    "as_tasks",
    "batches",
    "check_task",
    "examples_in",
    "score",
    "with_teacher",
]


class Task(NamedTuple):
    """What a network is scored on.

    Attributes:
        inputs: any pytree whose leaves have a leading example axis `[N, ...]`.
        targets: likewise, whatever the metric makes of them; None for a metric without labels.
        metric: a name in `megajax.merging.metrics.METRICS`, a function
            `(outputs, targets) -> scores [b]`, or a `Metric`. None is told by the targets' type and
            shape, see `megajax.merging.metrics.default_metric`.
        apply_fn: the network on this task, if it is not the one of the merge (another head).
        weight: of its score among those of several tasks.
        name: for reports; None is `task_0` and so on.
    """

    inputs: PyTree
    targets: PyTree = None
    metric: Any = None
    apply_fn: ApplyFn | None = None
    weight: float = 1.0
    name: str | None = None


def as_tasks(data: Any) -> list[Task]:
    """Tasks from what a user may give: a pair of inputs and targets, a `Task`, or several.

    Raises:
        DataError: it is none of these.

    Example:
        >>> len(as_tasks((np.zeros((3, 2)), np.zeros(3, int))))
        1
    """
    if isinstance(data, Task):
        return [data]
    if isinstance(data, (list, tuple)) and data and all(isinstance(one, Task) for one in data):
        return list(data)
    if isinstance(data, tuple) and len(data) == 2 and not hasattr(data, "_fields"):
        return [Task(*data)]
    raise DataError(
        f"the data is a {type(data).__name__}: a pair (inputs, targets), a Task or a list of "
        "Tasks is needed, with whole arrays"
    )


def with_teacher(task: Task, apply_fn: ApplyFn, parents: Sequence[PyTree]) -> Task:
    """A label-free task with its targets: the mean of the parents' predicted probabilities.

    Args:
        task: its metric is `distill`; other tasks, and those with targets, stay as they are.
        apply_fn: the network of the merge.
        parents: K variable pytrees, as they were given.

    Example:
        >>> task = Task(np.eye(2, dtype=np.float32), metric="distill")
        >>> opposite = [np.float32([[50, -50], [50, -50]]), np.float32([[-50, 50], [-50, 50]])]
        >>> with_teacher(task, lambda w, x: x @ w, opposite).targets.tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    if task.targets is not None or getattr(task.metric, "name", task.metric) != "distill":
        return task
    check_inputs(task.inputs, "inputs")
    network = task.apply_fn or apply_fn
    outputs = [predict(network, parent, task.inputs) for parent in parents]
    shifted = [np.exp(one - one.max(axis=-1, keepdims=True)) for one in outputs]
    mean = np.mean([one / one.sum(axis=-1, keepdims=True) for one in shifted], axis=0)
    return task._replace(targets=mean.astype(np.float32))


def check_task(task: Task, apply_fn: ApplyFn, variables: PyTree, number: int = 0) -> Task:
    """A task that can be scored: every choice made, every shape checked, nothing computed.

    Args:
        task: as its owner gave it.
        apply_fn: the network of the merge.
        variables: of one network, or their shapes and dtypes.
        number: of the task, for its name.

    Returns:
        The task with NumPy arrays and a `Metric`, without an `apply_fn` of None.

    Raises:
        DataError: inputs, targets or the network's outputs do not fit together.
        ConfigError: the metric does not give a score for each example.

    Example:
        >>> task = Task(np.ones((3, 2)), np.zeros(3, int))
        >>> check_task(task, lambda w, x: x @ w, np.ones((2, 4))).metric.name
        'cross_entropy'
    """
    name = task.name or f"task_{number}"
    count = check_inputs(task.inputs, f"inputs of {name}" if number or task.name else "inputs")
    inputs = jax.tree.map(np.asarray, task.inputs)
    targets = jax.tree.map(np.asarray, task.targets)
    for path, leaf in leaves_by_path(targets).items():
        which = f"targets{f' {path}' if path else ''}"
        if leaf.ndim == 0 or len(leaf) != count:
            raise DataError(f"{count} examples but {which} of shape {leaf.shape} ({name})")
        check_finite(leaf, f"the {which} of {name}")
    network = task.apply_fn or apply_fn
    outputs = output_shapes(network, variables, _of_length(2, inputs))
    metric = checked_metric(task.metric, outputs, targets, name)
    if not (np.isfinite(task.weight) and task.weight >= 0):
        raise ConfigError(f"the weight of {name} is {task.weight!r}: it must be at least 0")
    return Task(inputs, targets, metric, network, float(task.weight), name)


def checked_metric(metric: Any, outputs: PyTree, targets: PyTree, name: str) -> Metric:
    """The metric of a task, if it takes these outputs (or their shapes and dtypes) and targets.

    Args:
        metric: as in `Task`.
        outputs: of any number of examples.
        targets: leaves `[N, ...]`, NumPy.
        name: of the task.

    Raises:
        DataError: outputs and targets do not fit together.
        ConfigError: the metric does not give a score for each example.

    Example:
        >>> checked_metric(None, np.zeros((3, 4)), np.array([0, 3, 1]), "digits").name
        'cross_entropy'
    """
    if metric is None:
        metric = default_metric(_of_length(2, outputs), _of_length(2, targets))
    metric = as_metric(metric)
    if metric == METRICS.get(metric.name):
        _check_targets(metric, targets, outputs, name)
    _check_metric(metric, outputs, targets, name)
    return metric


def _of_length(count: int, tree: PyTree) -> PyTree:
    """Shapes and dtypes of so many examples."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), canonicalize_dtype(leaf.dtype)),
        tree,
    )


def _check_targets(metric: Metric, targets: PyTree, outputs: PyTree, name: str) -> None:
    """Checks what a metric of the library's own cannot see in a compiled program."""
    wanted, weights = targets if isinstance(targets, tuple) and len(targets) == 2 else (targets, 0)
    if metric.kind == "classes" and metric.name != "distill":
        check_labels(targets, outputs, name)
    elif metric.kind != "values" and not 0 <= np.min(wanted) <= np.max(wanted) <= 1:
        raise DataError(
            f"targets of {name} run from {np.min(wanted)} to {np.max(wanted)}: {metric.name} takes "
            "those from 0 to 1"
        )
    if wanted is not targets and (np.min(weights) < 0 or not np.any(weights)):
        raise DataError(f"weights of {name}: none may be negative, nor all of them 0")


def check_labels(targets: PyTree, outputs: Any, name: str = "") -> None:
    """Checks that targets are class numbers of a network's logits.

    Args:
        targets: labels, or a pair of labels and weights.
        outputs: shapes and dtypes of the logits `[b, ..., C]`.
        name: of the task, for the error.

    Raises:
        DataError: the outputs are no array, labels are not integers, not of the logits' shape, or
            one lies outside [0, C).

    Example:
        >>> check_labels(np.array([0, 3]), np.zeros((2, 3)))
        Traceback (most recent call last):
        ...
        megajax.errors.DataError: labels run from 0 to 3, but the network has 3 classes (0 to 2)
    """
    of = f" of {name}" if name and name != "task_0" else ""
    labels = targets[0] if isinstance(targets, tuple) else targets
    if not hasattr(outputs, "shape") or not hasattr(labels, "dtype"):
        raise DataError(f"logits and labels{of} must be one array each")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels{of} are {labels.dtype}: whole numbers are needed")
    if labels.shape[1:] != outputs.shape[1:-1]:
        raise DataError(
            f"labels{of} have shape {list(labels.shape)}, logits "
            f"{['b', *outputs.shape[1:]]}: one label for each row of logits is needed"
        )
    counted = labels[labels != IGNORED]
    if not counted.size:
        raise DataError(f"labels{of}: all of them are ignored ({IGNORED})")
    classes = outputs.shape[-1]
    if counted.min() < 0 or counted.max() >= classes:
        raise DataError(
            f"labels{of} run from {counted.min()} to {counted.max()}, but the network has "
            f"{classes} classes (0 to {classes - 1})"
        )


def _check_metric(metric: Metric, outputs: PyTree, targets: PyTree, name: str) -> None:
    """One `eval_shape` of the metric before anything runs, for each of two numbers of examples.

    Two, lest another axis happens to be as long as there are examples.
    """
    for count in (2, 3):
        few, made = _of_length(count, targets), _of_length(count, outputs)
        _check_shapes(metric, made, few, count, f"metric {metric.name} of {name}")


def _check_shapes(metric: Metric, outputs: PyTree, targets: PyTree, count: int, own: str) -> None:
    def score(outputs: PyTree, targets: PyTree) -> tuple[PyTree, Any]:
        statistics = metric.statistics(outputs, targets)
        return statistics, metric.of(statistics, jnp.ones(count, bool))

    try:
        statistics = jax.eval_shape(metric.statistics, outputs, targets)
        shapes = [leaf.shape for leaf in jax.tree.leaves(statistics)]
        if metric.plain and shapes != [(count,)]:
            given = "nothing" if not shapes else ", ".join(map(str, shapes))
            raise ConfigError(
                f"{own} gives {given} for {count} examples: scores [b] are needed, one for each "
                "example"
            )
        short = [shape for shape in shapes if shape[:1] != (count,)]
        if short:
            raise ConfigError(
                f"{own} gives statistics {short[0]} for {count} examples: one entry for each is "
                "needed"
            )
        value = jax.eval_shape(score, outputs, targets)[1]
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's own function raises
        raise ConfigError(
            f"{own} does not take outputs {told(outputs)} and targets {told(targets)}: "
            f"{first_line(error)}"
        ) from error
    if getattr(value, "shape", None) != ():
        raise ConfigError(f"{own} gives {told(value)}: a single number is needed")


def score(apply_fn: ApplyFn, variables: PyTree, data: Any) -> dict[str, float]:
    """A network's score on each task, by the task's own metric: for test data, say.

    Args:
        apply_fn: the network.
        variables: its variables.
        data: as for `megajax.merge`.

    Returns:
        Task's name -> score, maximised. Examples of which nothing counts are left out.

    Raises:
        DataError: data that does not fit the network.
        ConfigError: a metric that does not give a score for each example.

    Example:
        >>> score(lambda w, x: x @ w, np.eye(2), Task(np.eye(2), np.arange(2), "accuracy"))
        {'task_0': 1.0}
    """
    tasks = [check_task(one, apply_fn, variables, k) for k, one in enumerate(as_tasks(data))]
    found = {}
    for task in tasks:
        outputs = predict(task.apply_fn or apply_fn, variables, task.inputs)
        found[str(task.name)] = score_of(task, outputs)
    return found


def score_of(task: Task, outputs: PyTree) -> float:
    """The score of outputs for all examples of a checked task."""
    return float(task.metric.of(task.metric.statistics(outputs, task.targets), counted(task)))


def batches(task: Task, batch_size: int) -> Batches:
    """Cuts the examples of a checked task into batches, evenly, so that little is padded.

    Args:
        task: from `check_task`.
        batch_size: the largest batch to make.

    Returns:
        `ceil(N / batch_size)` batches.

    Example:
        >>> task = Task(np.zeros((10, 2)), np.zeros(10, int))
        >>> batches(task, 6).valid.sum(axis=1).tolist()
        [5, 5]
    """
    return cut(task.inputs, task.targets, batch_size, counted(task))


def examples_in(tasks: Sequence[Task]) -> int:
    """How many examples of some tasks count.

    Example:
        >>> examples_in([Task(np.zeros((3, 2)), np.array([1, IGNORED, 0])), Task(np.zeros(4))])
        6
    """
    return sum(int(counted(task).sum()) for task in tasks)


def counted(task: Task) -> np.ndarray:
    """Which examples count, `[N]` bool: all but those whose labels are all ignored.

    Example:
        >>> counted(Task(np.zeros((3, 2)), np.array([1, IGNORED, 0]))).tolist()
        [True, False, True]
    """
    total = jax.tree.leaves(task.inputs)[0].shape[0]
    labels = task.targets[0] if isinstance(task.targets, tuple) else task.targets
    if not hasattr(labels, "dtype") or not np.issubdtype(labels.dtype, np.integer):
        return np.ones(total, bool)
    return (np.asarray(labels) != IGNORED).reshape(total, -1).any(axis=1)
