"""One run, from a configuration to a filled workdir: a list of stages, done in order.

A stage is a function of the task (the configuration, its data and network) and of the outcomes of
the stages before it. What it returns is stored in the workdir, and a later start of the same run
takes it from there instead of doing the stage again. `STAGES` is the list; `run` is the loop.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import megajax
from megajax import data, models, report, training, workdir
from megajax.adapters import from_linen
from megajax.config import Config, to_dict
from megajax.errors import ConfigError
from megajax.evaluation import TENTHS, ensemble, measure, predict, straight_path
from megajax.evolution import GAInfo, GAState
from megajax.genome import parent_shares
from megajax.merging import genome_for, merge
from megajax.normalization import find_statistics, recalibrate
from megajax.types import ApplyFn, Key, PyTree
from megajax.workdir import Outcome

__all__ = ["STAGES", "Stage", "Task", "prepare", "run"]

_PATH_IMAGES = 1000
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_STREAMS = ("data", "shards", "parents", "search")  # of random numbers; append, never reorder


@dataclass(frozen=True)
class Task:
    """What every stage knows: the configuration, what follows from it at once, and where to write.

    Attributes:
        config: every choice.
        folder: the workdir.
        console: where progress goes.
        dataset: the images, split.
        shards: for each parent, indices of its training images.
        model: the network of the zoo.
        apply_fn: the same in inference mode.
    """

    config: Config
    folder: Path
    console: Console
    dataset: data.Dataset
    shards: Sequence[np.ndarray]
    model: nn.Module
    apply_fn: ApplyFn

    @property
    def calibration(self) -> jax.Array:
        """The training images that statistics are measured on."""
        return jnp.asarray(self.dataset.train.images[: self.config.recalibrate.examples])


Outcomes = Mapping[str, Outcome]


class Stage(NamedTuple):
    """A step of a run.

    Attributes:
        run: `run(task, outcomes of the stages before) -> outcome`, the same for the same arguments.
        sections: of the configuration, which its outcome depends on beside the earlier stages'.
    """

    run: Callable[[Task, Outcomes], Outcome]
    sections: tuple[str, ...] = ()


def run(config: Config, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Trains the parents, merges them, measures everything and writes the workdir.

    Args:
        config: every choice.
        folder: the workdir; what an earlier start of the same run finished there is not done again.
        console: where progress and the final table go; None says nothing.

    Returns:
        The content of `results.json`.

    Raises:
        MegajaxError: data, parents, configuration or workdir cannot work.
    """
    console = console or Console(quiet=True)
    results = workdir.finished(folder, to_dict(config))
    if results is not None:
        console.print(f"{folder} is finished; its result was:")
        _show(console, results)
        return results

    started = time.monotonic()
    task = prepare(config, folder, console)
    workdir.open_workdir(folder, to_dict(config), _environment())
    outcomes = {"data": Outcome(seconds=time.monotonic() - started)}
    for name, stage in STAGES.items():
        outcome = workdir.load_outcome(folder, name)
        if outcome is None:
            started = time.monotonic()
            outcome = stage.run(task, outcomes)
            outcome = outcome._replace(seconds=time.monotonic() - started)
            workdir.save_outcome(folder, name, outcome)
        else:
            console.print(f"{name}: taken from {folder}")
        outcomes[name] = outcome
    results = dict(workdir.read_json(folder / workdir.RESULTS))
    _show(console, results)
    console.print(f"report: {folder / 'report.md'}")
    return results


def prepare(config: Config, folder: Path, console: Console) -> Task:
    """Loads the data, builds the network and checks the choices; writes nothing.

    Args:
        config: every choice.
        folder: the workdir to be.
        console: where progress will go.

    Returns:
        What the stages need.

    Raises:
        MegajaxError: data or configuration cannot work.
    """
    dataset = data.load(_key(config, "data"), config.data)
    model = models.build(config.model.name, dataset.num_classes, config.model.options)
    shards = data.shards(
        _key(config, "shards"), dataset.train.labels, dataset.num_classes, config.parents
    )
    apply_fn = from_linen(model, {}, train=False).apply_fn
    _check_choices(config, model, apply_fn, dataset.train.images[:1])
    return Task(config, folder, console, dataset, shards, model, apply_fn)


def train_parents(task: Task, outcomes: Outcomes) -> Outcome:
    """Trains the parents, each on its shard."""
    config = task.config
    with _progress(task.console) as progress:
        bar = progress.add_task("training parents", total=config.training.epochs)
        parents, _ = training.train(
            _key(config, "parents"),
            task.model,
            task.dataset.train,
            task.shards,
            config.training,
            shared_initialization=config.parents.shared_initialization,
            callback=lambda epoch, metrics: progress.advance(bar),
        )
    return Outcome(networks={f"parents/{k}": parent for k, parent in enumerate(parents)})


def search(task: Task, outcomes: Outcomes) -> Outcome:
    """Merges the parents; a line of `metrics.jsonl` for each generation."""
    config, split = task.config, task.dataset.validation
    metrics_file = task.folder / workdir.METRICS
    metrics_file.unlink(missing_ok=True)
    started = time.monotonic()
    with _progress(task.console) as progress:
        bar = progress.add_task("merging", total=config.evolution.generations)

        def on_chunk(state: GAState, infos: GAInfo) -> None:
            seconds = {"seconds": round(time.monotonic() - started, 3)}
            columns = {name: column.tolist() for name, column in infos._asdict().items()}
            rows = zip(*columns.values(), strict=True)
            lines = [dict(zip(columns, row, strict=True)) | seconds for row in rows]
            workdir.append_lines(metrics_file, lines)
            progress.update(
                bar,
                completed=lines[-1]["generation"],
                description=f"merging, fitness {lines[-1]['best_ever']:.4f}",
            )

        merged = merge(
            _key(config, "search"),
            task.apply_fn,
            _networks(outcomes["parents"], "parents"),
            (split.images, split.labels),
            calibration=task.calibration,
            align=config.align,
            recalibrate=config.recalibrate,
            genome=config.genome,
            fitness=config.fitness,
            evolution=config.evolution,
            callback=on_chunk,
        )
    aligned = {f"aligned/{k}": parent for k, parent in enumerate(merged.parents)}
    return Outcome(
        networks={"merged": merged.variables, **aligned},
        values={
            "fitness": merged.fitness,
            "parent_fitness": merged.parent_fitness.tolist(),
            "evaluations": merged.evaluations,
            "generations": int(merged.state.generation),
            "genes": merged.genome.num_genes,
            "population_chunk": merged.population_chunk,
            "shares": parent_shares(merged.genome, merged.genes, merged.variables),
        },
        files=(workdir.METRICS,),
    )


def measure_all(task: Task, outcomes: Outcomes) -> Outcome:
    """Everybody's figures on validation and, for the first and only time, on test images."""
    config, dataset, found = task.config, task.dataset, outcomes["search"].values
    parents = _networks(outcomes["parents"], "parents")
    aligned = _networks(outcomes["search"], "aligned")
    merged = outcomes["search"].networks["merged"]
    baselines = {"uniform_average": _average(parents)}
    if config.align.method != "none":
        baselines["aligned_average"] = _average(aligned)
    if config.recalibrate.enabled:
        baselines["recalibrated_average"] = recalibrate(
            task.apply_fn, _average(aligned), task.calibration
        )
    names = [*range(len(parents)), *baselines, "merged"]
    networks = [*parents, *baselines.values(), merged]
    figures: dict[Any, dict[str, float]] = {name: {} for name in [*names, "ensemble"]}
    for part, split in (("validation", dataset.validation), ("test", dataset.test)):
        logits = [
            predict(task.apply_fn, variables, split.images, config.fitness.batch_size)
            for variables in networks
        ]
        logits.append(ensemble(np.stack(logits[: len(parents)])))
        for name, predictions in zip([*names, "ensemble"], logits, strict=True):
            metrics = measure(predictions, split.labels)
            figures[name][f"{part}_accuracy"] = metrics.accuracy
            figures[name][f"{part}_nll"] = metrics.nll
    for k, fitness in enumerate(found["parent_fitness"]):
        figures[k]["fitness"] = fitness
    figures["merged"]["fitness"] = found["fitness"]
    return Outcome(
        values={
            "parents": [figures[k] for k in range(len(parents))],
            "baselines": {name: figures[name] for name in (*baselines, "ensemble")},
            "merged": figures["merged"],
            "path": _path(task, parents, aligned, merged, found["shares"]),
        }
    )


def write_report(task: Task, outcomes: Outcomes) -> Outcome:
    """Puts the figures together: `report.md`, plots and, last, `results.json`."""
    found, dataset = outcomes["search"].values, task.dataset
    results = {
        "seed": task.config.seed,
        **outcomes["measure"].values,
        **{name: found[name] for name in ("evaluations", "generations", "genes")},
        "population_chunk": found["population_chunk"],
        "data": {
            "name": dataset.name,
            "train": len(dataset.train.labels),
            "validation": len(dataset.validation.labels),
            "test": len(dataset.test.labels),
        },
        "seconds": {name: outcome.seconds for name, outcome in outcomes.items()},
    }
    history = workdir.read_lines(task.folder / workdir.METRICS)
    report.write_report(task.folder, results, history, found["shares"])
    workdir.write_json(task.folder / workdir.RESULTS, results)  # last: it says that all is there
    plots = sorted((task.folder / "plots").glob("*.png"))
    return Outcome(files=("report.md", *(f"plots/{plot.name}" for plot in plots), workdir.RESULTS))


STAGES: Mapping[str, Stage] = {
    "parents": Stage(train_parents, ("seed", "data", "model", "parents", "training")),
    "search": Stage(search, ("align", "recalibrate", "genome", "fitness", "evolution")),
    "measure": Stage(measure_all),
    "report": Stage(write_report),
}


def _key(config: Config, stream: str) -> Key:
    return jax.random.fold_in(jax.random.key(config.seed), _STREAMS.index(stream))


def _check_choices(config: Config, model: nn.Module, apply_fn: ApplyFn, images: np.ndarray) -> None:
    """Finds mistakes that only show with the network before the parents are trained, not after."""
    one = jax.eval_shape(model.init, jax.random.key(0), images)
    count = config.parents.count
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), one)
    genome = genome_for(apply_fn, stacked, images, config.genome)
    if config.recalibrate.enabled and not find_statistics(apply_fn, one, images):
        raise ConfigError("recalibrate.enabled is True: the network has no BatchNorm statistics")
    if isinstance(config.align.reference, int) and config.align.reference >= count:
        raise ConfigError(
            f"align.reference is {config.align.reference}: the parents are 0 to {count - 1}"
        )
    jax.eval_shape(lambda: genome.init(jax.random.key(0), config.evolution.population_size))


def _networks(outcome: Outcome, folder: str) -> list[PyTree]:
    """The networks `folder/0`, `folder/1` and so on."""
    count = sum(name.startswith(f"{folder}/") for name in outcome.networks)
    return [outcome.networks[f"{folder}/{k}"] for k in range(count)]


def _path(
    task: Task,
    parents: Sequence[PyTree],
    aligned: Sequence[PyTree],
    merged: PyTree,
    shares: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Validation metrics on the line between parents 0 and 1, as they are and aligned."""
    config, apply_fn = task.config, task.apply_fn
    images, labels = (part[:_PATH_IMAGES] for part in task.dataset.validation[:2])
    measured = partial(straight_path, images=images, labels=labels)
    lines = {"as they are": measured(apply_fn, *parents[:2])}
    if config.align.method != "none":
        lines["aligned"] = measured(apply_fn, *aligned[:2])
    if config.recalibrate.enabled:
        fresh = partial(recalibrate, apply_fn, inputs=task.calibration)
        lines["aligned, recalibrated"] = measured(apply_fn, *aligned[:2], prepare=fresh)
    of_merged = measure(predict(apply_fn, merged, images), labels)
    share = float(np.mean([row[1] for row in shares.values()]))
    return {
        "shares": TENTHS,
        "lines": {name: [point._asdict() for point in line] for name, line in lines.items()},
        "merged": {"share": share, **of_merged._asdict()},
    }


def _average(parents: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(
        lambda *leaves: np.mean(np.stack(leaves), axis=0, dtype=np.float32), *parents
    )


def _environment() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "versions": {"megajax": megajax.__version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in _PACKAGES},
        "device": {"platform": device.platform, "kind": device.device_kind},
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _show(console: Console, results: Mapping[str, Any]) -> None:
    header, *body = report.rows(results)
    table = Table()
    for column in header:
        table.add_column(escape(column), justify="left" if column == header[0] else "right")
    for row in body:
        table.add_row(*row, style="bold" if row[0] == "merged" else None)
    console.print(table)
    console.print(report.answer(results), soft_wrap=True, highlight=False)
