"""The figures put together: report, plots, model card, exports and, last, `results.json`."""

from __future__ import annotations

from typing import Any

import numpy as np

from megajax import report
from megajax.evaluation.predictions import load_predictions
from megajax.evaluation.results import entries
from megajax.formats import FORMATS, export, map_names
from megajax.io import read_lines, write_json
from megajax.run import processes as distributed
from megajax.run import store as workdir
from megajax.run.checkpoint import Checkpoints
from megajax.run.config import to_dict
from megajax.run.stages.task import Outcomes, Task
from megajax.run.store import Outcome
from megajax.run.tensorboard import write_tensorboard

__all__ = ["write_report"]

_CARD_FIGURES = ("validation_accuracy", "test_accuracy", "test_nll")


def write_report(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Writes what a run shows; its files are remade if one of them is damaged."""
    del checkpoints
    if not distributed.is_first():
        return Outcome()
    config, found = task.config, outcomes["search"].values
    results = _results(task, outcomes)
    history = read_lines(task.folder / workdir.METRICS)
    if "nodes" in found:  # the picture is of the last search, which made the root
        root = found["nodes"][-1]
        history = [line for line in history if line["round"] == root["round"]]
    shares = {name: np.asarray(rows) for name, rows in found["shares"].items()}
    report.write_report(task.folder, results, history, shares, load_predictions(task.folder))
    files = ["report.md", "report.html"]
    files += [f"plots/{plot.name}" for plot in sorted((task.folder / "plots").glob("*"))]
    files += _export(task, outcomes, results)
    if config.tensorboard:
        write_tensorboard(task.folder / "tensorboard", history)
    write_json(task.folder / workdir.RESULTS, results)  # last: it says that all is there
    return Outcome(files=(*files, workdir.RESULTS))


def _results(task: Task, outcomes: Outcomes) -> dict[str, Any]:
    config, dataset, found = task.config, task.dataset, outcomes["search"].values
    results: dict[str, Any] = {
        "seed": config.seed,
        **outcomes["measure"].values,
        **{name: found[name] for name in ("evaluations", "generations", "genes")},
        "plan": found["plan"],
        "alignment_objective": outcomes["align"].values["objective"],
        "data": {
            "name": dataset.name,
            "train": len(dataset.train.labels),
            "validation": len(dataset.validation.labels),
            "test": len(dataset.test.labels),
        },
        "seconds": {name: outcome.seconds for name, outcome in outcomes.items()},
    }
    if isinstance(config.fitness.metric, str):
        results["metric"] = config.fitness.metric
    if config.fitness.select_on_test:
        results["not_held_out"] = True
    if "nodes" in found:
        results["nodes"] = found["nodes"]
    origin = workdir.read_config(task.folder).get("forked_from")
    if origin is not None:
        results["forked_from"] = origin
    return results


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
