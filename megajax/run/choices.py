"""Every choice that cannot work is refused here: with the data and network, before any training."""

from __future__ import annotations

import jax
import numpy as np

from megajax.baselines import BASELINES
from megajax.baselines.registry import applicable
from megajax.errors import ConfigError
from megajax.evaluation.robustness import PUBLISHED_CORRUPTIONS
from megajax.merging import tasks as merging
from megajax.merging.merge import problem_for, search_of, tasks_of
from megajax.program.roles import find_statistics
from megajax.run.config import Config
from megajax.run.measurement import published
from megajax.run.stages.task import Task
from megajax.run.tensorboard import require_tensorboard
from megajax.search import evosax
from megajax.search.genetic import check_operators
from megajax.types import PyTree
from megajax.zoo.training import make_schedule

__all__ = ["baseline_names", "check_choices", "has_base"]


def check_choices(task: Task) -> None:
    """Finds the mistakes that only show with the data, the network or the devices of a run.

    Raises:
        MegajaxError: a choice cannot work; names its field.
    """
    config = task.config
    one = jax.eval_shape(task.model.init, jax.random.key(0), task.dataset.train.images[:1])
    make_schedule(config.training, 1)
    _check_merge(task, one)
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
    available = {"calibration", "labels"}
    if config.parents.count == 2:
        available.add("two parents")
    if has_base(config):
        available.add("base")
    if evosax.is_installed():
        available.add("evosax")
    return [n for n in applicable(config.baselines.names, available) if n != "best_parent"]


def has_base(config: Config) -> bool:
    """Whether a run knows the network that its parents were trained from.

    Example:
        >>> has_base(Config())
        False
    """
    return config.parents.shared_initialization and not config.parents.paths


def _check_merge(task: Task, one: PyTree) -> None:
    """Builds the problem and the search from zeros, as the search itself will from the parents."""
    config, images = task.config, task.dataset.train.images[:2]
    met = 2 if config.hierarchy.enabled else config.parents.count
    zeros = [jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), one)] * met
    evolution, selection = config.evolution, task.selection
    few = [_fewer(one) for one in selection]
    fitness = task.sections["fitness"].replace(racing_examples=None)
    problem = problem_for(
        task.apply_fn,
        zeros,
        list(task.tasks) or few,
        calibration=images,
        base=zeros[0] if has_base(config) else None,
        recalibrate=config.recalibrate.replace(examples=2),
        genome=config.genome,
        fitness=fitness,
        keep=dict(config.parents.keep),
        population_size=evolution.population_size,
    )
    if task.held_out:
        tasks_of(task.apply_fn, zeros, [_fewer(one) for one in task.held_out], fitness)
    search = search_of(problem, evolution, fitness)
    genes = jax.eval_shape(
        lambda key: problem.genome.init(key, evolution.population_size, problem.parents),
        jax.random.key(0),
    )
    check_operators(search, genes)
    named = config.recalibrate.statistics
    if config.recalibrate.enabled and not find_statistics(task.apply_fn, one, images, named):
        raise ConfigError("recalibrate.enabled is True: the network has no BatchNorm statistics")
    reference = config.align.reference
    if isinstance(reference, int) and reference >= met:
        raise ConfigError(f"align.reference is {reference}: the parents are 0 to {met - 1}")
    racing, there = config.fitness.racing_examples, merging.examples_in(selection)
    if racing is not None:
        why = f"there are only {there} validation examples"
        config.fitness.require(len(selection) == 1, "racing_examples", "races are for one task")
        config.fitness.require(racing <= there, "racing_examples", why)


def _fewer(task: merging.Task) -> merging.Task:
    inputs, targets = jax.tree.map(lambda leaf: leaf[:64], (task.inputs, task.targets))
    return task._replace(inputs=inputs, targets=targets)


def _check_budgets(config: Config) -> None:
    size, names = config.evolution.population_size, baseline_names(config)
    searches = config.parents.count - 1 if config.hierarchy.enabled else 1
    least, each = searches * size, f" of {searches} nodes" if searches > 1 else ""
    budget, why = config.evolution.evaluation_budget, f"the first populations{each} alone need"
    enough = budget is None or budget >= least
    config.evolution.require(enough, "evaluation_budget", f"{why} {least}")
    budget = config.baselines.budget
    for name in names:
        if BASELINES[name].searches and name != "line":
            why = f"the first population alone of {name} needs {size}"
            config.baselines.require(budget is None or budget >= size, "budget", why)
