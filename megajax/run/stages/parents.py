"""The parents: trained here, each on its shard, or loaded from files."""

from __future__ import annotations

from functools import partial

import jax

from megajax.formats import NameMap, load_parents
from megajax.run.checkpoint import Checkpoints
from megajax.run.stages.task import Outcomes, Task, stream, train
from megajax.run.store import Outcome
from megajax.trees import keep_leaves
from megajax.types import PyTree
from megajax.zoo import training

__all__ = ["obtain_parents"]


def obtain_parents(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Trains the parents, or loads them; leaves that are kept from one parent are put into all."""
    del outcomes
    if task.config.parents.paths:
        return _outcome(task, _loaded(task))
    config = task.config
    arguments = (stream(config, "parents"), task.model, task.dataset.train, task.shards)
    shared = config.parents.shared_initialization
    first = training.init(*arguments, config.training, shared_initialization=shared)
    run = partial(training.train, *arguments, config.training, shared_initialization=shared)
    epochs = config.training.epochs
    parents, seconds = train(task, checkpoints, "training of the parents", epochs, first, run)
    outcome = _outcome(task, parents)._replace(seconds=seconds)
    if shared:  # what they have in common before training: a base network for task vectors
        base = jax.tree.map(lambda leaf: leaf[0], first.variables)
        outcome = outcome._replace(networks={**outcome.networks, "base": base})
    return outcome


def _loaded(task: Task) -> list[PyTree]:
    config = task.config.parents
    said: set[str] = set()

    def say(names: NameMap) -> None:
        """What became of a file's arrays, unless it is what became of another's."""
        text = names.describe(short=True).removeprefix(names.file)
        alike = ": as in a file above" if text in said else text
        task.console.print(f"{names.file}{alike}", soft_wrap=True, highlight=False, markup=False)
        said.add(text)

    return load_parents(
        config.paths,
        task.model,
        inputs=task.dataset.train.images[:2],
        rename=dict(config.rename),
        ignore=config.ignore,
        cast=config.cast,
        keep=dict(config.keep),
        callback=say,
    )


def _outcome(task: Task, parents: list[PyTree]) -> Outcome:
    whole = keep_leaves(parents, dict(task.config.parents.keep))
    return Outcome(networks={f"parents/{k}": parent for k, parent in enumerate(whole)})
