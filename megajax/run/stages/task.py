"""What every stage knows and needs: the task, its random keys, its progress bar and its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megajax.baselines import applicable
from megajax.config import FitnessConfig
from megajax.errors import ConfigError, Interrupted
from megajax.evaluation.robustness import PUBLISHED_CORRUPTIONS, published
from megajax.formats import from_linen
from megajax.keys import named_key
from megajax.merging.merge import genome_for
from megajax.merging.plans import plan_evaluation
from megajax.program.roles import find_statistics
from megajax.run import processes as distributed
from megajax.run import store as workdir
from megajax.run.config import Config
from megajax.run.store import Outcome
from megajax.run.tensorboard import require_tensorboard
from megajax.trees import stacked_shapes
from megajax.types import ApplyFn, Key, PyTree
from megajax.zoo import data
from megajax.zoo import networks as models

__all__ = [
    "Clock",
    "Outcomes",
    "Task",
    "baseline_names",
    "interrupted",
    "networks_in",
    "planned",
    "prepare",
    "progress_bar",
    "stream",
]


@dataclass(frozen=True)
class Task:
    """What every stage knows: the configuration, what follows from it at once, and where to write.

    Attributes:
        config: every choice.
        folder: the workdir.
        console: where progress goes.
        stopping: says whether the run was asked to stop, once its state is saved.
        dataset: the images, split.
        shards: for each parent, indices of its training images.
        model: the network of the zoo.
        apply_fn: the same in inference mode.
    """

    config: Config
    folder: Path
    console: Console
    stopping: Callable[[], bool]
    dataset: data.Dataset
    shards: Sequence[np.ndarray]
    model: nn.Module
    apply_fn: ApplyFn

    @property
    def calibration(self) -> jax.Array:
        """The training images that activations are matched and statistics measured on."""
        return jnp.asarray(self.dataset.train.images[: self.config.recalibrate.examples])

    @property
    def selection(self) -> data.Split:
        """The images that the search is scored on."""
        on_test = self.config.fitness.select_on_test
        return self.dataset.test if on_test else self.dataset.validation


Outcomes = Mapping[str, Outcome]


def prepare(
    config: Config, folder: Path, console: Console, stopping: Callable[[], bool] = lambda: False
) -> Task:
    """Loads the data, builds the network and checks the choices; writes nothing.

    Args:
        config: every choice.
        folder: the workdir to be.
        console: where progress will go.
        stopping: see `megajax.run.pipeline.run`.

    Returns:
        What the stages need.

    Raises:
        MegajaxError: data or configuration cannot work.
    """
    dataset = data.load(stream(config, "data"), config.data)
    model = models.build(config.model.name, dataset.num_classes, config.model.options)
    shards = data.shards(
        stream(config, "shards"), dataset.train.labels, dataset.num_classes, config.parents
    )
    apply_fn = from_linen(model, {}, train=False).apply_fn
    _check_choices(config, model, apply_fn, dataset.train.images[:1])
    return Task(config, folder, console, stopping, dataset, shards, model, apply_fn)


def stream(config: Config, name: str) -> Key:
    """The key of a stream of random numbers, all of which come from the seed.

    Example:
        >>> keys = [stream(Config(), name) for name in ("data", "search")]
        >>> bool((jax.random.key_data(keys[0]) == jax.random.key_data(keys[1])).all())
        False
    """
    return named_key(jax.random.key(config.seed), name)


def baseline_names(config: Config) -> list[str]:
    """The baselines that a run compares with; the best parent is in every table as it is.

    Raises:
        ConfigError: one that is named needs something that the run has not.

    Example:
        >>> baseline_names(Config())[:2]
        ['uniform_average', 'slerp']
    """
    available = {"validation", "calibration"}
    if config.parents.count == 2:
        available.add("two parents")
    if config.parents.shared_initialization and not config.parents.paths:
        available.add("base")
    return [n for n in applicable(config.baselines.names, available) if n != "best_parent"]


def networks_in(outcome: Outcome, folder: str) -> list[PyTree]:
    """The networks `folder/0`, `folder/1` and so on.

    Example:
        >>> networks_in(Outcome(networks={"parents/0": "a", "parents/1": "b"}), "parents")
        ['a', 'b']
    """
    count = sum(name.startswith(f"{folder}/") for name in outcome.networks)
    return [outcome.networks[f"{folder}/{k}"] for k in range(count)]


def planned(task: Task, network: PyTree) -> FitnessConfig:
    """The fitness on all devices, its plan by numbers where it is measured: once for a workdir.

    Args:
        task: the run.
        network: one of the parents.
    """
    fitness, file = task.config.fitness, task.folder / workdir.PLAN
    if fitness.devices == "auto":
        fitness = fitness.replace(devices="all")
    if not fitness.trial:
        return fitness
    if not file.exists():
        size = task.config.evolution.population_size
        plan = plan_evaluation(task.apply_fn, network, task.selection.images, fitness, size)
        chosen = {"population_chunk": plan.population_chunk, "batch_size": plan.batch_size}
        numbers = distributed.of_first({name: np.int32(n) for name, n in chosen.items()})
        workdir.write_json(file, {name: int(number) for name, number in numbers.items()})
    return fitness.replace(trial=False, **workdir.read_json(file))


def progress_bar(console: Console) -> Progress:
    """A bar with counts and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def interrupted(unit: str, number: int) -> Interrupted:
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


def _check_choices(config: Config, model: nn.Module, apply_fn: ApplyFn, images: np.ndarray) -> None:
    """Finds mistakes that only show with the network before the parents are trained, not after."""
    one = jax.eval_shape(model.init, jax.random.key(0), images)
    count = config.parents.count
    met = 2 if config.hierarchy.enabled else count
    stacked = stacked_shapes(one, met)
    keep = tuple(pattern for pattern, _ in config.parents.keep)
    genome = genome_for(apply_fn, stacked, images, config.genome, freeze=keep)
    if config.recalibrate.enabled and not find_statistics(apply_fn, one, images):
        raise ConfigError("recalibrate.enabled is True: the network has no BatchNorm statistics")
    if isinstance(config.align.reference, int) and config.align.reference >= met:
        raise ConfigError(
            f"align.reference is {config.align.reference}: the parents are 0 to {met - 1}"
        )
    first = partial(genome.init, jax.random.key(0), config.evolution.population_size)
    jax.eval_shape(first, stacked)
    baseline_names(config)
    if config.robustness.enabled and config.robustness.published:
        name = (config.robustness.corruptions or PUBLISHED_CORRUPTIONS)[0]
        published(config.data)(name, config.robustness.severities[0])
    if config.tensorboard:
        require_tensorboard()
