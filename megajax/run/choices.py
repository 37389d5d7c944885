"""Every choice that cannot work is refused here: with the data and network, before any training."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from megajax.baselines import BASELINES, applicable
from megajax.config import FitnessConfig
from megajax.errors import ConfigError, first_line
from megajax.evaluation.robustness import PUBLISHED_CORRUPTIONS, published
from megajax.merging.merge import genome_for
from megajax.merging.plans import plan_evaluation
from megajax.program.roles import find_statistics
from megajax.run.config import Config
from megajax.run.stages.task import Task
from megajax.run.tensorboard import require_tensorboard
from megajax.trees import stacked_shapes
from megajax.types import PyTree
from megajax.zoo.training import make_schedule

__all__ = ["baseline_names", "check_choices", "fitness_of"]


def check_choices(task: Task) -> None:
    """Finds the mistakes that only show with the data, the network or the devices of a run.

    Raises:
        MegajaxError: a choice cannot work; names its field.
    """
    config = task.config
    one = jax.eval_shape(task.model.init, jax.random.key(0), task.dataset.train.images[:1])
    make_schedule(config.training, 1)
    _check_genome(task, one)
    _check_fitness(task, one)
    _check_budgets(config)
    if config.robustness.enabled and config.robustness.published:
        name = (config.robustness.corruptions or PUBLISHED_CORRUPTIONS)[0]
        published(config.data)(name, config.robustness.severities[0])
    if config.tensorboard:
        require_tensorboard()


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


def fitness_of(config: Config) -> FitnessConfig:
    """The fitness of a run, where `auto` takes all devices.

    Example:
        >>> fitness_of(Config()).devices
        'all'
    """
    fitness = config.fitness
    return fitness.replace(devices="all") if fitness.devices == "auto" else fitness


def _check_genome(task: Task, one: PyTree) -> None:
    config, images = task.config, task.dataset.train.images[:1]
    met = 2 if config.hierarchy.enabled else config.parents.count
    stacked = stacked_shapes(one, met)
    keep = tuple(pattern for pattern, _ in config.parents.keep)
    genome = genome_for(task.apply_fn, stacked, images, config.genome, freeze=keep)
    first = partial(genome.init, jax.random.key(0), config.evolution.population_size)
    jax.eval_shape(first, stacked)
    if config.recalibrate.enabled and not find_statistics(task.apply_fn, one, images):
        raise ConfigError("recalibrate.enabled is True: the network has no BatchNorm statistics")
    reference = config.align.reference
    if isinstance(reference, int) and reference >= met:
        raise ConfigError(f"align.reference is {reference}: the parents are 0 to {met - 1}")


def _check_fitness(task: Task, one: PyTree) -> None:
    fitness, split = fitness_of(task.config), task.selection
    images = jax.ShapeDtypeStruct(split.images.shape, jnp.float32)
    plan_evaluation(task.apply_fn, one, images, fitness, task.config.evolution.population_size)
    racing, there = fitness.racing_examples, len(split.labels)
    if racing is not None and racing > there:
        raise ConfigError(
            f"fitness.racing_examples is {racing}: there are only {there} validation examples"
        )
    if callable(fitness.metric):
        logits = jax.ShapeDtypeStruct((3, task.dataset.num_classes), jnp.float32)
        labels = jax.ShapeDtypeStruct((3,), jnp.int32)
        try:
            scores = jax.eval_shape(fitness.metric, logits, labels)
        except Exception as error:  # of the user's function
            raise ConfigError(f"fitness.metric fails: {first_line(error)}") from None
        shape = getattr(scores, "shape", None)
        if shape != (3,):
            raise ConfigError(
                f"fitness.metric gives {shape} for logits (3, {task.dataset.num_classes}) and "
                "labels (3,): a score for each example, (3,), is needed"
            )


def _check_budgets(config: Config) -> None:
    size, names = config.evolution.population_size, baseline_names(config)
    searches = config.parents.count - 1 if config.hierarchy.enabled else 1
    budget = config.evolution.evaluation_budget
    if budget is not None and budget < searches * size:
        each = f" of {searches} nodes" if searches > 1 else ""
        raise ConfigError(
            f"evolution.evaluation_budget is {budget}: the first populations{each} alone need "
            f"{searches * size}"
        )
    budget = config.baselines.budget
    in_masks = [name for name in names if BASELINES[name].searches and name != "line"]
    if budget is not None and in_masks and budget < size:
        raise ConfigError(
            f"baselines.budget is {budget}: the first population alone of {in_masks[0]} needs "
            f"{size}"
        )
