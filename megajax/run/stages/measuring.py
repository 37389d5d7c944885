"""Everybody's figures on validation and, for the first and only time, on test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from megajax.evaluation.measures import TENTHS, predict, predictor, straight_path
from megajax.evaluation.measures import measure as metrics_of
from megajax.evaluation.predictions import PREDICTIONS, save_predictions
from megajax.merging.merge import tasks_of
from megajax.run import processes as distributed
from megajax.run.checkpoint import Checkpoints
from megajax.run.measurement import measure_networks, measure_task
from megajax.run.stages.task import Outcomes, Task, fittest, networks_in, stream
from megajax.run.store import Outcome
from megajax.types import PyTree

__all__ = ["measure"]

_PATH_IMAGES = 1000


def measure(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Measures parents, baselines, fine-tuned networks, ensemble and the merged network."""
    del checkpoints
    config, found = task.config, outcomes["search"].values
    parents = networks_in(outcomes["parents"], "parents")
    merged = outcomes["search"].networks["merged"]
    names = [f"parent_{k}" for k in range(len(parents))]
    compared = {
        name.removeprefix("baselines/"): network
        for stage in ("baselines", "finetune")
        for name, network in outcomes[stage].networks.items()
    }
    networks = dict(zip(names, parents, strict=True)) | compared | {"merged": merged}
    with task.console.status("measuring all networks"):
        measured = measure_networks(
            stream(config, "robustness"),
            predictor(
                task.apply_fn,
                networks,
                {"ensemble": names},
                (outcomes["search"].values["plan"] or {"batch_size": 512})["batch_size"],
            ),
            task.dataset,
            config.robustness,
            config.data,
        )
        path = _path(task, outcomes, merged, found["shares"])
    if distributed.is_first():
        save_predictions(task.folder, measured.predictions)
    entries = measured.entries
    for name, fitness in zip(names, found["parent_fitness"], strict=True):
        entries[name]["fitness"] = fitness
    entries["merged"]["fitness"] = found["fitness"]
    cost = outcomes["search"].values
    entries["merged"] |= _cost(cost["evaluations"], cost["examples_scored"])
    cost = outcomes["baselines"].values
    for name, evaluations in cost["evaluations"].items():
        if evaluations:
            entries[name] |= _cost(evaluations, cost["examples_scored"][name])
    values = {
        "parents": [entries[name] for name in names],
        "baselines": {name: entries[name] for name in (*compared, "ensemble")},
        "merged": entries["merged"],
        "path": path,
    }
    if measured.robustness is not None:
        values["robustness"] = measured.robustness
    if found["tasks"]:
        with task.console.status("measuring all networks on the tasks"):
            values["tasks"] = _with_test(task, found["tasks"], networks, names[fittest(outcomes)])
    return Outcome(values=values, files=(PREDICTIONS,))


def _with_test(
    task: Task, scores: Mapping[str, Any], networks: Mapping[str, PyTree], best: str
) -> dict[str, Any]:
    """What the search says of each task, with everybody's score on its test examples."""
    parents = [network for name, network in networks.items() if name.startswith("parent_")]
    on_test = {}
    if task.held_out:
        for one in tasks_of(task.apply_fn, parents, list(task.held_out), task.config.fitness):
            key = stream(task.config, f"test of {one.name}")
            on_test[one.name] = {"test": measure_task(key, one, networks, best)}
    return {name: {**of_search, **on_test.get(name, {})} for name, of_search in scores.items()}


def _cost(evaluations: int, examples: int) -> dict[str, float]:
    """Networks that were scored, and on how many images each of them: a mean if they differ."""
    each, rest = divmod(examples, evaluations)
    return {"evaluations": evaluations, "images_scored": examples / evaluations if rest else each}


def _path(
    task: Task,
    outcomes: Outcomes,
    merged: PyTree,
    shares: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Validation metrics on the line between parents 0 and 1, as they are and aligned."""
    config, apply_fn = task.config, task.apply_fn
    parents = networks_in(outcomes["parents"], "parents")[:2]
    aligned = networks_in(outcomes["align"], "aligned")[:2]
    images, labels = (part[:_PATH_IMAGES] for part in task.dataset.validation[:2])
    measured = partial(straight_path, apply_fn, images=images, labels=labels)
    lines = {"as they are": measured(*parents)}
    if config.align.method != "none":
        lines["aligned"] = measured(*aligned)
    if config.recalibrate.enabled:
        named = config.recalibrate.statistics
        lines["aligned, recalibrated"] = measured(
            *aligned, calibration=task.calibration, statistics=named
        )
    of_merged = metrics_of(predict(apply_fn, merged, images), labels)
    share = np.mean([np.mean(np.atleast_2d(rows), axis=0)[1] for rows in shares.values()])
    return {
        "shares": TENTHS,
        "lines": {name: [point._asdict() for point in line] for name, line in lines.items()},
        "merged": {"share": float(share), **of_merged._asdict()},
    }
