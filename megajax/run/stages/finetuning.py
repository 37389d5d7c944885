"""Training after the merge, and the best parent trained just as long."""

from __future__ import annotations

import numpy as np

from megajax.run.checkpoint import Checkpoints
from megajax.run.stages.task import Outcomes, Task, networks_in, stream
from megajax.run.store import Outcome
from megajax.zoo import training

__all__ = ["finetune"]


def finetune(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Fine-tunes the merged network and the best parent; nothing if there are no epochs."""
    del checkpoints
    config = task.config
    if not config.finetune.epochs:
        return Outcome()
    search = outcomes["search"]
    fitness = [np.nan if f is None else f for f in search.values["parent_fitness"]]
    best = networks_in(outcomes["parents"], "parents")[int(np.nanargmax(fitness))]
    with task.console.status(f"fine-tuning for {config.finetune.epochs} epochs"):
        networks, _ = training.finetune(
            stream(config, "finetune"),
            task.model,
            task.dataset.train,
            [search.networks["merged"], best],
            config.finetune,
            config.training,
        )
    names = ("merged_finetuned", "best_parent_finetuned")
    return Outcome(networks=dict(zip(names, networks, strict=True)))
