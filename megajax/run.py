"""The command line: reads a config, wires the pieces, writes the workdir.

    python -m megajax.run --config experiments/digits.py
    python -m megajax.run --config exp.py --config.evolution.population_size=64 --workdir DIR

A config file is a Python program: run only those you trust. A mistake in it, in a flag or in the
data is one line on the standard error and exit code 2.
"""

from __future__ import annotations

import platform
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import megajax
from megajax import data, models, report, training, workdir
from megajax.adapters import from_linen
from megajax.config import Config, from_dict, to_dict
from megajax.errors import ConfigError, MegajaxError
from megajax.evaluation import TENTHS, ensemble, measure, predict, straight_path
from megajax.evolution import GAInfo, GAState
from megajax.genome import parent_shares
from megajax.merging import MergeResult, genome_for, merge
from megajax.normalization import find_statistics, recalibrate
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["main", "run"]

_PATH_IMAGES = 1000
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m megajax.run`.

    Args:
        argv: program name and arguments; None takes the command line's.

    Returns:
        The exit code: 0; 2 for a mistake that could be named; 130 when interrupted.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        config, folder = _parse(list(sys.argv if argv is None else argv))
        run(config, folder, Console())
    except MegajaxError as error:
        errors.print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    return 0


def run(config: Config, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Trains the parents, merges them, measures everything and writes the workdir.

    Args:
        config: every choice.
        folder: the workdir; a finished one is not run again.
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

    clock = [time.monotonic()]
    data_key, shard_key, train_key, merge_key = jax.random.split(jax.random.key(config.seed), 4)
    dataset = data.load(data_key, config.data)
    model = models.build(config.model.name, dataset.num_classes, config.model.options)
    shards = data.shards(shard_key, dataset.train.labels, dataset.num_classes, config.parents)
    apply_fn = from_linen(model, {}, train=False).apply_fn
    _check_choices(config, model, apply_fn, dataset.train.images[:1])
    workdir.open_workdir(folder, to_dict(config), _environment())

    clock.append(time.monotonic())
    parents = _parents(train_key, config, folder, model, dataset.train, shards, console)
    clock.append(time.monotonic())
    merged, history = _search(merge_key, config, folder, apply_fn, parents, dataset, console)
    clock.append(time.monotonic())
    results = _measure(config, apply_fn, dataset, parents, merged)
    results["path"] = _path(config, apply_fn, dataset, parents, merged)
    clock.append(time.monotonic())

    stages = ("data", "training", "search", "evaluation")
    results["seconds"] = dict(zip(stages, np.diff(clock).tolist(), strict=True))
    workdir.save_network(folder / "merged", merged.variables)
    shares = parent_shares(merged.genome, merged.genes, merged.variables)
    report.write_report(folder, results, history, shares)
    workdir.write_json(folder / workdir.RESULTS, results)  # last: it says that all is there
    _show(console, results)
    console.print(f"report: {folder / 'report.md'}")
    return results


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


def _parents(
    key: Key,
    config: Config,
    folder: Path,
    model: nn.Module,
    split: data.Split,
    shards: Sequence[np.ndarray],
    console: Console,
) -> list[PyTree]:
    """Trains the parents, or loads those that an earlier start of this run trained."""
    folders = [folder / "parents" / str(k) for k in range(config.parents.count)]
    if all(path.exists() for path in folders):
        console.print(f"parents: loaded from {folder / 'parents'}")
        return [workdir.load_network(path) for path in folders]
    with _progress(console) as progress:
        task = progress.add_task("training parents", total=config.training.epochs)
        parents, _ = training.train(
            key,
            model,
            split,
            shards,
            config.training,
            shared_initialization=config.parents.shared_initialization,
            callback=lambda epoch, metrics: progress.advance(task),
        )
    for path, parent in zip(folders, parents, strict=True):
        workdir.save_network(path, parent)
    return parents


def _search(
    key: Key,
    config: Config,
    folder: Path,
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    dataset: data.Dataset,
    console: Console,
) -> tuple[MergeResult, list[dict[str, Any]]]:
    """Merges the parents; a line of `metrics.jsonl` for each generation."""
    metrics_file = folder / "metrics.jsonl"
    metrics_file.unlink(missing_ok=True)
    history: list[dict[str, Any]] = []
    started = time.monotonic()
    with _progress(console) as progress:
        task = progress.add_task("merging", total=config.evolution.generations)

        def on_chunk(state: GAState, infos: GAInfo) -> None:
            seconds = {"seconds": round(time.monotonic() - started, 3)}
            columns = {name: column.tolist() for name, column in infos._asdict().items()}
            rows = zip(*columns.values(), strict=True)
            lines = [dict(zip(columns, row, strict=True)) | seconds for row in rows]
            workdir.append_lines(metrics_file, lines)
            history.extend(lines)
            progress.update(
                task,
                completed=lines[-1]["generation"],
                description=f"merging, fitness {lines[-1]['best_ever']:.4f}",
            )

        merged = merge(
            key,
            apply_fn,
            parents,
            (dataset.validation.images, dataset.validation.labels),
            calibration=_calibration(config, dataset),
            align=config.align,
            recalibrate=config.recalibrate,
            genome=config.genome,
            fitness=config.fitness,
            evolution=config.evolution,
            callback=on_chunk,
        )
    return merged, history


def _measure(
    config: Config,
    apply_fn: ApplyFn,
    dataset: data.Dataset,
    parents: Sequence[PyTree],
    merged: MergeResult,
) -> dict[str, Any]:
    """Everybody's figures on validation and, for the first and only time, on test images."""
    baselines = {"uniform_average": _average(parents)}
    if config.align.method != "none":
        baselines["aligned_average"] = _average(merged.parents)
    if config.recalibrate.enabled:
        baselines["recalibrated_average"] = recalibrate(
            apply_fn, _average(merged.parents), _calibration(config, dataset)
        )
    names = [*range(len(parents)), *baselines, "merged"]
    networks = [*parents, *baselines.values(), merged.variables]
    figures: dict[Any, dict[str, float]] = {name: {} for name in [*names, "ensemble"]}
    for part, split in (("validation", dataset.validation), ("test", dataset.test)):
        logits = [
            predict(apply_fn, variables, split.images, config.fitness.batch_size)
            for variables in networks
        ]
        logits.append(ensemble(np.stack(logits[: len(parents)])))
        for name, predictions in zip([*names, "ensemble"], logits, strict=True):
            metrics = measure(predictions, split.labels)
            figures[name][f"{part}_accuracy"] = metrics.accuracy
            figures[name][f"{part}_nll"] = metrics.nll
    for k, fitness in enumerate(merged.parent_fitness):
        figures[k]["fitness"] = float(fitness)
    figures["merged"]["fitness"] = merged.fitness
    return {
        "seed": config.seed,
        "parents": [figures[k] for k in range(len(parents))],
        "baselines": {name: figures[name] for name in (*baselines, "ensemble")},
        "merged": figures["merged"],
        "evaluations": merged.evaluations,
        "generations": int(merged.history.generation[-1]),
        "genes": merged.genome.num_genes,
        "population_chunk": merged.population_chunk,
        "data": {
            "name": dataset.name,
            "train": len(dataset.train.labels),
            "validation": len(dataset.validation.labels),
            "test": len(dataset.test.labels),
        },
    }


def _path(
    config: Config,
    apply_fn: ApplyFn,
    dataset: data.Dataset,
    parents: Sequence[PyTree],
    merged: MergeResult,
) -> dict[str, Any]:
    """Validation metrics on the line between parents 0 and 1, as they are and aligned."""
    images, labels = (part[:_PATH_IMAGES] for part in dataset.validation[:2])
    measured = partial(straight_path, images=images, labels=labels)
    lines = {"as they are": measured(apply_fn, *parents[:2])}
    if config.align.method != "none":
        lines["aligned"] = measured(apply_fn, *merged.parents[:2])
    if config.recalibrate.enabled:
        prepare = partial(recalibrate, apply_fn, inputs=_calibration(config, dataset))
        lines["aligned, recalibrated"] = measured(apply_fn, *merged.parents[:2], prepare=prepare)
    of_merged = measure(predict(apply_fn, merged.variables, images), labels)
    by_layer = parent_shares(merged.genome, merged.genes, merged.variables)
    share = float(np.mean([row[1] for row in by_layer.values()]))
    return {
        "shares": TENTHS,
        "lines": {name: [point._asdict() for point in line] for name, line in lines.items()},
        "merged": {"share": share, **of_merged._asdict()},
    }


def _average(parents: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(
        lambda *leaves: np.mean(np.stack(leaves), axis=0, dtype=np.float32), *parents
    )


def _calibration(config: Config, dataset: data.Dataset) -> jax.Array:
    return jnp.asarray(dataset.train.images[: config.recalibrate.examples])


def _parse(argv: list[str]) -> tuple[Config, Path]:
    """Reads the flags and the config file that they name."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Python file with get_config().",
        lock_config=False,
        accept_new_attributes=True,  # so that all unknown fields are named by from_dict
        flag_values=values,
        sys_argv=argv,
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; runs/NAME-seedSEED if absent.", flag_values=values
    )
    flags.DEFINE_bool("help", False, "Shows this help.", short_name="h", flag_values=values)
    try:
        rest = values(argv)
        if values.help:
            print(f"{__doc__}\n{values.main_module_help()}")
            raise SystemExit(0)
        if len(rest) > 1:
            raise ConfigError(f"{rest[1]!r} is no flag; see --help")
        if values["config"].value is None:
            raise ConfigError("--config FILE is missing; see --help")
        file = Path(values["config"].config_filename.split(":")[0])
        if not file.exists():
            raise ConfigError(f"config file {file} does not exist")
        chosen = values.config
        if not isinstance(chosen, ConfigDict):
            raise ConfigError(
                f"get_config() returned {type(chosen).__name__}: start from "
                "megajax.config.default_config() and return it"
            )
        config = from_dict(chosen.to_dict())
    except (MegajaxError, SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a config file or a flag may raise
        raise ConfigError(_describe(error)) from None
    return config, Path(values.workdir or Path("runs") / f"{file.stem}-seed{config.seed}")


def _describe(error: Exception) -> str:
    """One line on what went wrong, with the place in the config file where there is one."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, flags.Error):
        return message
    if isinstance(error, AttributeError) and "'get_config'" in message:
        return "the config file has no function get_config()"
    packages = (str(Path(module.__file__ or "").parent) for module in (flags, config_flags, jax))
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if last.filename.startswith(tuple(packages)) else f"{last.filename}, line "
    where += f"{last.lineno}: " if where else ""
    return f"{where}{type(error).__name__}: {message}"


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


if __name__ == "__main__":
    sys.exit(main())
