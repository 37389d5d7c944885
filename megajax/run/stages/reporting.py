"""The figures put together: report, plots, model card, exports and, last, `results.json`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from megajax import report
from megajax.evaluation.predictions import load_predictions
from megajax.evaluation.results import entries
from megajax.formats import FORMATS, export, map_names
from megajax.io import read_lines, write_json
from megajax.program.roles import find_layers
from megajax.run import processes as distributed
from megajax.run import store as workdir
from megajax.run.checkpoint import Checkpoints
from megajax.run.config import to_dict
from megajax.run.stages.comparing import facts
from megajax.run.stages.task import Outcomes, Task, networks_in
from megajax.run.store import Outcome
from megajax.run.tensorboard import write_tensorboard
from megajax.run.words import settings
from megajax.trees import leaf_paths
from megajax.types import PyTree
from megajax.zoo.data import class_names

__all__ = ["write_report"]

_CARD_FIGURES = ("validation_accuracy", "test_accuracy", "test_nll")


def write_report(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Writes what a run shows; its files are remade if one of them is damaged."""
    del checkpoints
    if not distributed.is_first():
        return Outcome()
    config, found = task.config, outcomes["search"].values
    history = read_lines(task.folder / workdir.METRICS)
    if "nodes" in found:  # the picture is of the last search, which made the root
        root = found["nodes"][-1]
        history = [line for line in history if line["round"] == root["round"]]
    results = _results(task, outcomes, history)
    shares = _by_layer(task, outcomes["search"].networks["merged"], found["shares"])
    report.write_report(task.folder, results, history, shares, load_predictions(task.folder))
    files = ["report.md", "report.html"]
    files += [f"plots/{plot.name}" for plot in sorted((task.folder / "plots").glob("*"))]
    files += _export(task, outcomes, results)
    if config.tensorboard:
        write_tensorboard(task.folder / "tensorboard", history)
    write_json(task.folder / workdir.RESULTS, results)  # last: it says that all is there
    return Outcome(files=(*files, workdir.RESULTS))


def _results(
    task: Task, outcomes: Outcomes, history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    config, dataset, found = task.config, task.dataset, outcomes["search"].values
    merged = outcomes["search"].networks["merged"]
    stored = workdir.read_config(task.folder)
    device, jax_version = stored["device"], stored["versions"]["jax"]
    results: dict[str, Any] = {
        "seed": config.seed,
        **outcomes["measure"].values,
        **{name: found[name] for name in ("evaluations", "generations", "genes", "plan")},
        "alignment_objective": outcomes["align"].values["objective"],
        "data": {"name": dataset.name}
        | {part: len(getattr(dataset, part).labels) for part in ("train", "validation", "test")},
        "settings": settings(
            config,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(merged)),
            genes=found["genes"],
        )
        | {"computed on": f"{device['number']} x {device['kind']}, JAX {jax_version}"},
        "seconds": {name: outcome.seconds for name, outcome in outcomes.items()},
    }
    evaluations = outcomes["baselines"].values["evaluations"]
    for name, of_method in facts(config, evaluations).items():
        results["baselines"].get(name, {}).update(of_method)
    results["merged"]["labels"] = config.fitness.metric != "distill"
    names = class_names(config.data)
    if len(names) == dataset.num_classes:
        results["data"]["classes"] = names
    metric = "tasks" if task.tasks else config.fitness.metric or "cross_entropy"
    others = {
        "smoke": config.smoke or None,
        "returned_parent": _returned_parent(outcomes, merged),
        "still_rising": _still_rising([line["best_ever"] for line in history]) or None,
        "metric": metric if isinstance(metric, str) else None,
        "not_held_out": config.fitness.select_on_test or None,
        "nodes": found.get("nodes"),
        "forked_from": stored.get("forked_from"),
    }
    return results | {name: value for name, value in others.items() if value is not None}


def _returned_parent(outcomes: Outcomes, merged: PyTree) -> int | None:
    """The parent whose parameters the merged network has, as it was given or aligned, if any."""

    def same(parent: PyTree) -> bool:
        pairs = zip(*(jax.tree.leaves(one["params"]) for one in (merged, parent)), strict=True)
        return all(np.array_equal(ours, theirs) for ours, theirs in pairs)

    for stage, folder in (("parents", "parents"), ("align", "aligned")):
        for k, parent in enumerate(networks_in(outcomes[stage], folder)):
            if same(parent):
                return k
    return None


def _still_rising(best: Sequence[float | None]) -> bool:
    """Whether the last tenth of the generations brought over a hundredth of the whole rise."""
    before = best[-1 - math.ceil((len(best) - 1) / 10)] if best else None
    if before is None or best[0] is None or best[-1] is None:
        return False
    return best[-1] - before > 0.01 * (best[-1] - best[0])


def _by_layer(
    task: Task, network: PyTree, shares: Mapping[str, Sequence[Any]]
) -> dict[str, np.ndarray]:
    """The shares of the module with most weights in each layer, in the order of the program."""
    layers = jax.tree.leaves(find_layers(task.apply_fn, network, task.dataset.train.images[:2]))
    leaves = zip(layers, jax.tree.leaves(network), leaf_paths(network), strict=True)
    modules: dict[int, str] = {}
    for layer, _, path in sorted(leaves, key=lambda leaf: (leaf[0], -leaf[1].size)):
        module = "/".join(path.split("/")[1:-1])
        if module in shares:
            modules.setdefault(layer, module)
    return {re.sub("[_/]+", " ", name): np.asarray(shares[name]) for name in modules.values()}


def _export(task: Task, outcomes: Outcomes, results: dict[str, Any]) -> list[str]:
    """The merged network in all formats that are asked for, and its model card."""
    config, loaded = task.config, task.config.parents
    names = None
    if loaded.paths and any(FORMATS[kind].flat for kind in config.export):
        names = map_names(
            loaded.paths[0],
            task.model,
            inputs=task.dataset.train.images[:2],
            rename=dict(loaded.rename),
            ignore=loaded.ignore,
            cast=loaded.cast,
        )
    trained = [{"parent": k, "path": f"parents/{k}"} for k in range(loaded.count)]
    paths = export(
        task.folder / "merged",
        outcomes["search"].networks["merged"],
        formats=tuple(dict.fromkeys(("msgpack", *config.export))),
        names=names,
        parents=loaded.paths or trained,
        versions=workdir.read_config(task.folder)["versions"],
        title="Merged network",
        method=to_dict(config),
        figures={
            name: {figure: entry[figure] for figure in _CARD_FIGURES}
            for name, entry in entries(results).items()
        },
        seed=config.seed,
    )
    return [str(path.relative_to(task.folder)) for path in paths.values() if path.is_file()]
