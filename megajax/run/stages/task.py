"""What every stage knows and needs: the task, its random keys, its progress and its clock."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megajax.errors import DataError, Interrupted, WorkdirError
from megajax.formats import from_linen
from megajax.keys import named_key
from megajax.merging import tasks as merging
from megajax.merging.problem import FitnessConfig
from megajax.run import processes as distributed
from megajax.run.checkpoint import Checkpoints
from megajax.run.config import Config, merge_sections
from megajax.run.store import Outcome, load_outcome, save_outcome
from megajax.types import ApplyFn, Key, PyTree
from megajax.zoo import data, networks, training

__all__ = [
    "Clock",
    "Outcomes",
    "Task",
    "fittest",
    "held_out",
    "interrupted",
    "kept",
    "load",
    "networks_in",
    "prepare",
    "progress",
    "save",
    "selection_of",
    "stream",
    "train",
]

_log = logging.getLogger(__name__)
_QUIET = 60.0  # seconds between two lines about the progress, where there is no terminal

Outcomes = Mapping[str, Outcome]


@dataclass(frozen=True)
class Task:
    """What every stage knows: the configuration, what follows from it at once, and where to write.

    Attributes:
        config: every choice.
        folder: the workdir.
        source: where it started: the workdir that it is forked from, or its own.
        console: where progress goes.
        stopping: says whether the run was asked to stop, once its state is saved.
        dataset: the images, split.
        shards: for each parent, indices of its training images.
        tasks: what the search is scored on, where the configuration lists tasks.
        held_out: the same on test images, or what the metric makes of those where it is none that
            every run reports; without tasks that are not made of the validation images.
        model: the network of the zoo.
        apply_fn: the same in inference mode.
    """

    config: Config
    folder: Path
    source: Path
    console: Console
    stopping: Callable[[], bool]
    dataset: data.Dataset
    shards: Sequence[np.ndarray]
    tasks: Sequence[merging.Task]
    held_out: Sequence[merging.Task]
    model: nn.Module
    apply_fn: ApplyFn

    @property
    def calibration(self) -> jax.Array:
        """The training images that activations are matched and statistics measured on."""
        return jnp.asarray(self.dataset.train.images[: self.config.recalibrate.examples])

    @property
    def sections(self) -> dict[str, Any]:
        """What merging and comparing take alike; the fitness on all devices where it is free to.

        A gradient is the work of one.
        """
        config, fitness = self.config, self.config.fitness
        if fitness.devices == "auto" and config.evolution.method != "gradient":
            fitness = fitness.replace(devices="all")
        return merge_sections(config) | {"fitness": fitness, "calibration": self.calibration}

    @property
    def selection(self) -> list[merging.Task]:
        """What the search is scored on; without labels, the training images."""
        return list(self.tasks) or selection_of(self.config.fitness, self.dataset)


def prepare(
    config: Config,
    folder: Path,
    console: Console,
    stopping: Callable[[], bool] = lambda: False,
    *,
    source: Path | None = None,
) -> Task:
    """Loads the data and builds the network; writes nothing.

    Args:
        config: every choice.
        folder: the workdir to be.
        console: where progress will go.
        stopping: see `megajax.run.pipeline.run`.
        source: the workdir that this one is forked from.

    Raises:
        MegajaxError: data or configuration cannot work.
    """
    dataset = data.load(stream(config, "data"), config.data)
    model = networks.build(config.model.name, dataset.num_classes, config.model.options)
    shards = data.shards(
        stream(config, "shards"), dataset.train.labels, dataset.num_classes, config.parents
    )
    apply_fn = from_linen(model, {}, train=False).apply_fn
    selection = selection_of(config.fitness, dataset)
    tasks = selection if config.fitness.tasks else []
    own = tasks, held_out(config.fitness, dataset, selection)
    return Task(
        config, folder, source or folder, console, stopping, dataset, shards, *own, model, apply_fn
    )


def held_out(
    fitness: FitnessConfig, dataset: data.Dataset, selection: Sequence[merging.Task]
) -> list[merging.Task]:
    """What a search is scored on, made of the test images instead of the validation images.

    Args:
        fitness: whose functions are called with the test images in the validation images' place.
        dataset: the images, split.
        selection: what the search is scored on.

    Returns:
        The tasks, without those that are the same as before, because they are made of other images;
        none for a metric that every run reports, or that takes training images.
    """
    if not fitness.tasks and fitness.metric in (None, "accuracy", "cross_entropy", "distill"):
        return []
    moved = dataset._replace(validation=dataset.test)
    pairs = zip(selection, selection_of(fitness, moved), strict=True)
    return [new._replace(weight=1.0) for old, new in pairs if not _same(old.inputs, new.inputs)]


def _same(first: PyTree, second: PyTree) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def selection_of(fitness: FitnessConfig, dataset: data.Dataset) -> list[merging.Task]:
    """What a search is scored on; a user's functions are called.

    Args:
        fitness: the configuration.
        dataset: the images, split.
    """
    if fitness.tasks:
        return [_task_of(function, dataset) for function in fitness.tasks]
    if fitness.metric == "distill":
        images = dataset.train.images[: fitness.distill_examples]
        return [merging.Task(images, metric="distill")]
    split = dataset.test if fitness.select_on_test else dataset.validation
    return [merging.Task(split.images, split.labels, name=dataset.name)]


def _task_of(function: Callable[..., Any], dataset: data.Dataset) -> merging.Task:
    """What a user's function makes of the data, called by its name if the task has none."""
    name = getattr(function, "__name__", repr(function))
    found = merging.as_tasks(function(dataset))
    if len(found) != 1:
        raise DataError(f"fitness.tasks: {name}() returned {len(found)} tasks: one is needed")
    return found[0]._replace(name=found[0].name or name)


def stream(config: Config, name: str) -> Key:
    """The key of a stream of random numbers, all of which come from the seed.

    Example:
        >>> keys = [stream(Config(), name) for name in ("data", "search")]
        >>> bool((jax.random.key_data(keys[0]) == jax.random.key_data(keys[1])).all())
        False
    """
    return named_key(jax.random.key(config.seed), name)


def kept(task: Task, name: str, key: str, make: Callable[[], Outcome]) -> Outcome:
    """The outcome of a stage or of a part of one: stored, or else made now and stored.

    Args:
        task: the run.
        name: of the stage or part.
        key: of all that goes into it.
        make: does the work.

    Raises:
        WorkdirError: it cannot be stored.
    """
    stored = load(task, name, key)
    if stored is not None:
        return stored
    started = time.monotonic()
    outcome = make()
    if outcome.seconds is None:
        outcome = outcome._replace(seconds=time.monotonic() - started)
    return save(task, name, key, outcome)


def load(task: Task, name: str, key: str) -> Outcome | None:
    """What is stored of a stage or part; None in all processes if the first one cannot use it."""
    stored = None
    if distributed.is_first():
        try:
            stored = load_outcome(task.folder, name, key)
        except WorkdirError as error:
            _log.warning("%s: %s is done again", error, name)
    if not distributed.of_first(np.bool_(stored is not None)):
        return None
    task.console.print(f"{name}: taken from {task.source}", soft_wrap=True, highlight=False)
    return _read_back(task, name, key) if stored is None else stored


def save(task: Task, name: str, key: str, outcome: Outcome) -> Outcome:
    """Stores what the first process found, and gives it to all.

    It is read back, so that what follows is the same whether or not a run is interrupted here.

    Raises:
        WorkdirError: it cannot be stored.
    """
    with distributed.together():
        if distributed.is_first():
            save_outcome(task.folder, name, key, outcome)
    return _read_back(task, name, key)


def _read_back(task: Task, name: str, key: str) -> Outcome:
    stored = load_outcome(task.folder, name, key)
    if stored is None:
        raise WorkdirError(f"{task.folder}: the outcome of {name} is gone")
    return stored


def networks_in(outcome: Outcome, folder: str) -> list[PyTree]:
    """The networks `folder/0`, `folder/1` and so on.

    Example:
        >>> networks_in(Outcome(networks={"parents/0": "a", "parents/1": "b"}), "parents")
        ['a', 'b']
    """
    count = sum(name.startswith(f"{folder}/") for name in outcome.networks)
    return [outcome.networks[f"{folder}/{k}"] for k in range(count)]


def fittest(outcomes: Outcomes) -> int:
    """The number of the parent with the highest fitness.

    Example:
        >>> fittest({"search": Outcome(values={"parent_fitness": [None, -2.0, -1.0]})})
        2
    """
    fitness = outcomes["search"].values["parent_fitness"]
    return int(np.argmax([-np.inf if value is None else value for value in fitness]))


def train(
    task: Task,
    checkpoints: Checkpoints,
    what: str,
    epochs: int,
    first: training.TrainState,
    run: Callable[..., tuple[list[PyTree], training.Metrics]],
) -> tuple[list[PyTree], float]:
    """Trains networks epoch by epoch, from the newest checkpoint, and stops when asked to.

    Args:
        task: the run.
        checkpoints: of this training.
        what: is trained, for the progress.
        epochs: in all.
        first: the state before the first epoch.
        run: `run(state=..., callback=...)`, of `megajax.zoo.training`.

    Returns:
        The networks, and the seconds that they took, earlier starts included.

    Raises:
        Interrupted: it was asked to stop; the state is saved.
    """
    state, clock = first, Clock()
    restored = checkpoints.restore({"training": first, "seconds": 0.0})
    if restored is not None:
        state, clock = restored.state["training"], Clock(restored.state["seconds"])
        task.console.print(f"{what} goes on after epoch {restored.step}")
    with progress(task.console, what, epochs) as update:

        def on_epoch(state: training.TrainState, metrics: training.Metrics) -> None:
            epoch = int(state.epoch)
            update(epoch)
            reached = {"training": state, "seconds": clock.seconds()}
            if task.stopping() and epoch < epochs:
                checkpoints.save(epoch, reached)
                raise interrupted("epoch", epoch)
            checkpoints.offer(epoch, reached)

        found, _ = run(state=state, callback=on_epoch)
    return found, clock.seconds()


@contextlib.contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with the time left or, where there is no terminal, a line a minute and one at the end.

    Yields:
        `update(done, note)`, where the note takes the place of what is done.
    """
    if console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
            bar = bars.add_task(what, total=total)
            yield lambda done, note=what: bars.update(bar, completed=done, description=note)
        return
    said = time.monotonic()

    def say(done: int, note: str = what) -> None:
        nonlocal said
        if time.monotonic() - said >= _QUIET or done == total:
            said = time.monotonic()
            console.print(f"{note}: {done} of {total}", soft_wrap=True, highlight=False)

    yield say


def interrupted(unit: str, number: Any) -> Interrupted:
    """What to raise when a run was asked to stop and its state is saved.

    Example:
        >>> str(interrupted("epoch", 3))
        'stopped and saved after epoch 3; the same command goes on from it'
    """
    return Interrupted(f"stopped and saved after {unit} {number}; the same command goes on from it")


class Clock:
    """Seconds spent, those of earlier starts included."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        """Until now."""
        return time.monotonic() - self._start
