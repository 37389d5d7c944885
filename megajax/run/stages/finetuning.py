"""Training after the merge, and the best parent trained just as long."""

from __future__ import annotations

from functools import partial

from megajax.run.checkpoint import Checkpoints
from megajax.run.stages.task import Outcomes, Task, fittest, networks_in, stream, train
from megajax.run.store import Outcome
from megajax.zoo import training

__all__ = ["finetune"]


def finetune(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Fine-tunes the merged network and the best parent; nothing if there are no epochs."""
    config, images = task.config, task.dataset.train
    if not config.finetune.epochs:
        return Outcome()
    search = outcomes["search"]
    best = networks_in(outcomes["parents"], "parents")[fittest(outcomes)]
    networks = [search.networks["merged"], best]
    run = partial(
        training.finetune,
        stream(config, "finetune"),
        task.model,
        images,
        networks,
        config.finetune,
        config.training,
    )
    first = training.begin_finetuning(images, networks, config.finetune, config.training)
    tuned, seconds = train(task, checkpoints, "fine-tuning", config.finetune.epochs, first, run)
    names = ("merged_finetuned", "best_parent_finetuned")
    return Outcome(networks=dict(zip(names, tuned, strict=True)), seconds=seconds)
