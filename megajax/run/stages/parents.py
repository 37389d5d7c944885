"""The parents: trained here, each on its shard, or loaded from files."""

from __future__ import annotations

import jax
import numpy as np

from megajax.formats import NameMap, load_parents
from megajax.run import processes as distributed
from megajax.run.checkpoint import Checkpoints
from megajax.run.stages.task import Clock, Outcomes, Task, interrupted, progress_bar, stream
from megajax.run.store import Outcome
from megajax.trees import keep_leaves
from megajax.types import PyTree
from megajax.zoo import training

__all__ = ["obtain_parents"]


def obtain_parents(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Trains the parents, or loads them; leaves that are kept from one parent are put into all.

    In a run of several processes all of them do so, and then take what the first one has: training
    is the same to the last bit only on the same hardware.
    """
    del outcomes
    paths = task.config.parents.paths
    outcome = _loaded(task) if paths else _trained(task, checkpoints)
    agreed = {name: distributed.of_first(found) for name, found in outcome.networks.items()}
    return outcome._replace(networks=agreed)


def _loaded(task: Task) -> Outcome:
    config, images = task.config.parents, task.dataset.train.images[:2]

    def say(names: NameMap) -> None:
        task.console.print(names.describe(short=True), soft_wrap=True, highlight=False, markup=False)

    parents = load_parents(
        config.paths,
        task.model,
        inputs=images,
        rename=dict(config.rename),
        ignore=config.ignore,
        cast=config.cast,
        keep=dict(config.keep),
        callback=say,
    )
    return _outcome(task, parents, seconds=None)


def _trained(task: Task, checkpoints: Checkpoints) -> Outcome:
    config, clock = task.config, Clock()
    arguments = (stream(config, "parents"), task.model, task.dataset.train, task.shards)
    shared = config.parents.shared_initialization
    first = training.init(*arguments, config.training, shared_initialization=shared)
    state = first
    restored = checkpoints.restore({"training": first, "seconds": np.float64()})
    if restored is not None:
        state, clock = restored.state["training"], Clock(restored.state["seconds"])
        task.console.print(f"training goes on after epoch {restored.step}")
    with progress_bar(task.console) as progress:
        bar = progress.add_task("training parents", total=config.training.epochs)

        def on_epoch(state: training.TrainState, metrics: training.Metrics) -> None:
            epoch = int(state.epoch)
            progress.update(bar, completed=epoch)
            reached = {"training": state, "seconds": np.float64(clock.seconds())}
            if task.stopping() and epoch < config.training.epochs:
                checkpoints.save(epoch, reached)
                raise interrupted("epoch", epoch)
            checkpoints.offer(epoch, reached)

        parents, _ = training.train(
            *arguments,
            config.training,
            shared_initialization=shared,
            state=state,
            callback=on_epoch,
        )
    outcome = _outcome(task, parents, clock.seconds())
    if shared:  # what they have in common before training: a base network for task vectors
        base = jax.tree.map(lambda leaf: leaf[0], first.variables)
        outcome = outcome._replace(networks={**outcome.networks, "base": base})
    return outcome


def _outcome(task: Task, parents: list[PyTree], seconds: float | None) -> Outcome:
    kept = keep_leaves(parents, dict(task.config.parents.keep))
    return Outcome(
        networks={f"parents/{k}": parent for k, parent in enumerate(kept)}, seconds=seconds
    )
