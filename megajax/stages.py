"""What the stages of a run do: train parents, search, measure, report.

Each is a function of the task (the configuration, its data and network), of the outcomes of the
stages before it, and of the checkpoints that it may go on from and save to. It returns its outcome,
networks and figures; when it is called, and how outcomes are stored, is up to `megajax.pipeline`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megajax import data, models, report, training, workdir
from megajax.adapters import from_linen
from megajax.checkpoint import Checkpoints
from megajax.config import Config, EvolutionConfig
from megajax.errors import ConfigError, Interrupted, SearchError
from megajax.evaluation import TENTHS, ensemble, measure, predict, straight_path
from megajax.evolution import GAInfo, GAState
from megajax.genome import parent_shares
from megajax.merging import genome_for, merge
from megajax.normalization import find_statistics, recalibrate
from megajax.operators import Population
from megajax.types import ApplyFn, Key, PyTree
from megajax.workdir import Outcome

__all__ = [
    "Outcomes",
    "Task",
    "measure_networks",
    "prepare",
    "search",
    "train_parents",
    "write_report",
]

_PATH_IMAGES = 1000
_STREAMS = ("data", "shards", "parents", "search")  # of random numbers; append, never reorder


@dataclass(frozen=True)
class Task:
    """What every stage knows: the configuration, what follows from it at once, and where to write.

    Attributes:
        config: every choice.
        folder: the workdir.
        console: where progress goes.
        stopping: says whether the run was asked to stop, once its state is saved.
        dataset: the images, split.
        shards: for each parent, indices of its training images.
        model: the network of the zoo.
        apply_fn: the same in inference mode.
    """

    config: Config
    folder: Path
    console: Console
    stopping: Callable[[], bool]
    dataset: data.Dataset
    shards: Sequence[np.ndarray]
    model: nn.Module
    apply_fn: ApplyFn

    @property
    def calibration(self) -> jax.Array:
        """The training images that statistics are measured on."""
        return jnp.asarray(self.dataset.train.images[: self.config.recalibrate.examples])


Outcomes = Mapping[str, Outcome]


def prepare(
    config: Config, folder: Path, console: Console, stopping: Callable[[], bool] = lambda: False
) -> Task:
    """Loads the data, builds the network and checks the choices; writes nothing.

    Args:
        config: every choice.
        folder: the workdir to be.
        console: where progress will go.
        stopping: see `run`.

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
    return Task(config, folder, console, stopping, dataset, shards, model, apply_fn)


def train_parents(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Trains the parents, each on its shard."""
    config, clock = task.config, _Clock()
    arguments = (_key(config, "parents"), task.model, task.dataset.train, task.shards)
    shared = config.parents.shared_initialization
    state = training.init(*arguments, config.training, shared_initialization=shared)
    restored = checkpoints.restore({"training": state, "seconds": np.float64()})
    if restored is not None:
        state, clock = restored.state["training"], _Clock(restored.state["seconds"])
        task.console.print(f"training goes on after epoch {restored.step}")
    with _progress(task.console) as progress:
        bar = progress.add_task("training parents", total=config.training.epochs)

        def on_epoch(state: training.TrainState, metrics: training.Metrics) -> None:
            epoch = int(state.epoch)
            progress.update(bar, completed=epoch)
            reached = {"training": state, "seconds": np.float64(clock.seconds())}
            if task.stopping() and epoch < config.training.epochs:
                checkpoints.save(epoch, reached)
                raise _interrupted("epoch", epoch)
            checkpoints.offer(epoch, reached)

        parents, _ = training.train(
            *arguments,
            config.training,
            shared_initialization=shared,
            state=state,
            callback=on_epoch,
        )
    return Outcome(
        networks={f"parents/{k}": parent for k, parent in enumerate(parents)},
        seconds=clock.seconds(),
    )


def search(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
    """Merges the parents; a line of `metrics.jsonl` for each generation."""
    config, split = task.config, task.dataset.validation
    journal = _Journal(task.folder / workdir.METRICS, checkpoints)
    evolution = _what_is_left(config.evolution, journal)
    if journal.state is not None:
        task.console.print(f"merging goes on after generation {journal.generation}")
    with _progress(task.console) as progress:
        bar = progress.add_task("merging", total=evolution.generations)

        def on_chunk(state: GAState, infos: GAInfo) -> None:
            journal.add(state, infos)
            best = f"merging, fitness {float(state.best.fitness):.4f}"
            progress.update(bar, completed=journal.generation, description=best)
            if task.stopping() and journal.generation < evolution.generations:
                journal.save()
                raise _interrupted("generation", journal.generation)
            journal.save_if_due()

        try:
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
                evolution=evolution,
                state=journal.state,
                callback=on_chunk,
            )
        except SearchError:
            journal.save()
            raise
    journal.save()
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
        seconds=journal.clock.seconds(),
    )


def measure_networks(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
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


def write_report(task: Task, outcomes: Outcomes, checkpoints: Checkpoints) -> Outcome:
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
    origin = workdir.read_config(task.folder).get("forked_from")
    if origin is not None:
        results["forked_from"] = origin
    history = workdir.read_lines(task.folder / workdir.METRICS)
    report.write_report(task.folder, results, history, found["shares"])
    workdir.write_json(task.folder / workdir.RESULTS, results)  # last: it says that all is there
    plots = sorted((task.folder / "plots").glob("*.png"))
    return Outcome(files=("report.md", *(f"plots/{plot.name}" for plot in plots), workdir.RESULTS))


class _Clock:
    """Seconds spent, those of earlier starts included."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start


def _key(config: Config, stream: str) -> Key:
    return jax.random.fold_in(jax.random.key(config.seed), _STREAMS.index(stream))


def _interrupted(unit: str, number: int) -> Interrupted:
    return Interrupted(f"stopped and saved after {unit} {number}; the same command goes on from it")


class _Journal:
    """A search under way: its state, and what each generation had to tell, as columns.

    It begins where the last checkpoint left it, and its file with it: lines that were written after
    that, or half written, are gone.
    """

    def __init__(self, file: Path, checkpoints: Checkpoints) -> None:
        self.state: GAState | None = None
        self.clock = _Clock()
        self._file, self._checkpoints = file, checkpoints
        self._history: dict[str, np.ndarray] = {}
        restored = checkpoints.restore()
        if restored is not None:
            self.state = _search_state(restored.state["search"])
            history = restored.state["history"]
            self._history = {name: history[name] for name in (*GAInfo._fields, "seconds")}
            self.clock = _Clock(history["seconds"][-1])
        workdir.write_lines(file, _rows(self._history))

    @property
    def generation(self) -> int:
        return int(self._history["generation"][-1])

    def add(self, state: GAState, infos: GAInfo) -> None:
        """Takes over a state, and writes a line for each generation that led to it."""
        seconds = np.full(len(infos.generation), round(self.clock.seconds(), 3))
        lines, before = {**infos._asdict(), "seconds": seconds}, self._history
        workdir.write_lines(self._file, _rows(lines), append=True)
        self.state = state
        self._history = {
            name: np.append(before[name], column) if before else column
            for name, column in lines.items()
        }

    def save(self) -> None:
        self._checkpoints.save(self.generation, self._content())

    def save_if_due(self) -> None:
        self._checkpoints.offer(self.generation, self._content())

    def _content(self) -> PyTree:
        return {"search": self.state, "history": self._history}


def _rows(columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _search_state(saved: Mapping[str, Any]) -> GAState:
    """The state from the nested dictionaries of a checkpoint, which `merge` checks."""
    population, best = (
        Population(saved[name]["genes"], saved[name]["fitness"], saved[name].get("aux", ()))
        for name in ("population", "best")
    )
    return GAState(population, best, saved["generation"], saved["evaluations"], saved["stale"])


def _what_is_left(evolution: EvolutionConfig, journal: _Journal) -> EvolutionConfig:
    """The configuration of a search that has done something already."""
    if journal.state is not None and journal.generation > evolution.generations:
        raise ConfigError(
            f"evolution.generations is {evolution.generations}: the search that it is to go on "
            f"from did {journal.generation} already"
        )
    if evolution.time_budget is None:
        return evolution
    left = max(evolution.time_budget - journal.clock.seconds(), 0.0)
    return dataclasses.replace(evolution, time_budget=left)


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


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
