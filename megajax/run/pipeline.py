"""One run, from a configuration to a filled workdir: the list of its stages, and the loop over it.

The outcome of a stage is stored in the workdir under a key, the digest of all that went into it.
A later start takes from there what is whole and has the right key, and does the rest: so a run may
be killed at any instant, or started from another's workdir. What the stages do is in
`megajax.run.stages`; this module knows when they are done, and what to say when they fail.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

import megajax
from megajax import report
from megajax.errors import ConfigError, DeviceError, Interrupted, WorkdirError, first_line
from megajax.evaluation.predictions import load_predictions
from megajax.io import digest, flatten, read_json
from megajax.report.page import show
from megajax.run import processes as distributed
from megajax.run import store as workdir
from megajax.run.checkpoint import Checkpoints
from megajax.run.choices import check_choices
from megajax.run.config import Config, to_dict
from megajax.run.stages import (
    aligning,
    comparing,
    finetuning,
    measuring,
    parents,
    reporting,
    searching,
)
from megajax.run.stages.task import Outcomes, Task, kept, networks_in, prepare
from megajax.run.store import Outcome
from megajax.types import PyTree

__all__ = ["STAGES", "Stage", "parents_of", "run"]

_log = logging.getLogger(__name__)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Stage(NamedTuple):
    """A step of a run.

    Attributes:
        run: `run(task, outcomes of the stages before, checkpoints) -> outcome`; the same for the
            same task and outcomes, and whatever the checkpoints.
        depends: sections of the configuration that its outcome depends on, beside earlier stages.
        state_depends: the same for its checkpoints, where that is less: they are kept when the
            stage is done, so that a run with another configuration can start from them.
        lighter: fields to lower when the memory does not suffice, the best one first.
    """

    run: Callable[[Task, Outcomes, Checkpoints], Outcome]
    depends: tuple[str, ...] = ()
    state_depends: tuple[str, ...] | None = None
    lighter: tuple[str, ...] = ("fitness.batch_size",)


_SEARCH = ("recalibrate", "genome", "fitness", "evolution", "hierarchy", "align")

STAGES: Mapping[str, Stage] = {
    "parents": Stage(
        parents.obtain_parents,
        depends=("seed", "data", "model", "parents", "training"),
        lighter=("training.batch_size",),
    ),
    "align": Stage(
        aligning.align,
        depends=("align", "recalibrate.examples"),
        lighter=("recalibrate.examples",),
    ),
    "search": Stage(
        searching.search,
        depends=_SEARCH,
        state_depends=(
            "recalibrate",
            "genome",
            "fitness.metric",
            "fitness.select_on_test",
            "fitness.tasks",
            "evolution.method",
            "evolution.population_size",
            "evolution.gradient_steps",
        ),
        lighter=("fitness.population_chunk", "fitness.batch_size", "evolution.population_size"),
    ),
    "finetune": Stage(
        finetuning.finetune, depends=("finetune", "training"), lighter=("training.batch_size",)
    ),
    "baselines": Stage(comparing.compare, depends=("baselines", *_SEARCH)),
    "measure": Stage(measuring.measure, depends=("robustness",)),
    "report": Stage(reporting.write_report, depends=("export", "tensorboard")),
}


def run(
    config: Config,
    folder: Path,
    console: Console | None = None,
    *,
    origin: Path | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains the parents, merges them, measures everything and writes the workdir.

    Args:
        config: every choice.
        folder: the workdir; what an earlier start of the same run finished there is not done again.
        console: where progress and the final table go; None says nothing.
        origin: another workdir, whose state a new one starts from as far as the configurations
            agree. It is left as it is.
        stopping: asked after every epoch, chunk of generations, baseline and stage; if true, the
            state is saved and `Interrupted` raised.

    Returns:
        The content of `results.json`.

    Raises:
        MegajaxError: data, parents, configuration, workdir or device cannot work.
    """
    console = console or Console(quiet=True)
    with distributed.together():
        workdir.check(folder, to_dict(config))
    results = _finished(config, folder)
    if results is not None:
        console.print(f"{folder} is finished; its result was:", soft_wrap=True)
        _show(console, folder, results)
        return results

    started = time.monotonic()
    with _opened(config, folder, console, origin, stopping) as task:
        outcomes = {"data": Outcome(seconds=time.monotonic() - started)}
        for name, stage in STAGES.items():
            outcomes[name] = _done(name, stage, task, outcomes)
        results = dict(read_json(folder / workdir.RESULTS))
    _show(console, folder, results)
    console.print(f"report: {folder / 'report.md'}", soft_wrap=True)
    return results


def parents_of(
    config: Config,
    folder: Path,
    console: Console | None = None,
    *,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[Task, list[PyTree]]:
    """A run's task and parents; they are kept in its workdir, where `run` finds them.

    Args:
        config: every choice.
        folder: the workdir.
        console: where progress goes; None says nothing.
        stopping: see `run`.

    Raises:
        MegajaxError: see `run`.
    """
    with _opened(config, folder, console or Console(quiet=True), None, stopping) as task:
        outcome = _done("parents", STAGES["parents"], task, {"data": Outcome()})
        return task, networks_in(outcome, "parents")


@contextlib.contextmanager
def _opened(
    config: Config,
    folder: Path,
    console: Console,
    origin: Path | None,
    stopping: Callable[[], bool],
) -> Iterator[Task]:
    """The data, and the workdir, which is ours until the end."""
    with contextlib.ExitStack() as held:
        with distributed.together():
            task = prepare(config, folder, console, stopping, source=origin)
            check_choices(task)
        with distributed.together():
            if distributed.is_first():
                held.enter_context(workdir.locked(folder))
                _open(task, origin)
        yield task


def _done(name: str, stage: Stage, task: Task, outcomes: Outcomes) -> Outcome:
    """The outcome of a stage: stored, or else made now, and stored."""
    of_state = stage.depends if stage.state_depends is None else stage.state_depends
    states = task.folder / "checkpoints" / name

    def make() -> Outcome:
        if task.stopping():
            raise Interrupted(
                f"stopped before the stage {name}; the same command goes on from there"
            )
        if distributed.is_first():  # what it says is of another outcome
            (task.folder / workdir.RESULTS).unlink(missing_ok=True)
        identity = _identity(task.config, of_state, outcomes)
        checkpoints = Checkpoints(states, identity, task.config.checkpoint)
        return stage.run(task, outcomes, checkpoints)

    with _faults(name, stage, task):
        key = _identity(task.config, stage.depends, outcomes)
        outcome = kept(task, name, key, make)
        if stage.state_depends is None and distributed.is_first():
            shutil.rmtree(states, ignore_errors=True)
    return outcome


def _identity(config: Config, fields: Sequence[str], outcomes: Outcomes) -> str:
    """The digest of what a stage depends on: the stages before it, and its fields."""
    values = to_dict(config)
    chosen = {}
    for field in fields:
        section, _, name = field.partition(".")
        chosen[field] = values[section][name] if name else values[section]
    return digest([[outcome.identity for outcome in outcomes.values()], chosen])


def _finished(config: Config, folder: Path) -> dict[str, Any] | None:
    """The results, if every stage is stored and whole."""
    if len(_stored(config, folder)) < len(STAGES):
        return None
    try:
        results: dict[str, Any] = read_json(folder / workdir.RESULTS)
    except WorkdirError:
        return None
    return results


def _stored(config: Config, folder: Path) -> list[str]:
    """The stages whose outcomes are stored and whole, up to the first that is not."""
    outcomes = {"data": Outcome()}
    with contextlib.suppress(WorkdirError):
        for name, stage in STAGES.items():
            key = _identity(config, stage.depends, outcomes)
            outcome = workdir.load_outcome(folder, name, key)
            if outcome is None:
                break
            outcomes[name] = outcome
    return [*outcomes][1:]


def _open(task: Task, origin: Path | None) -> None:
    """Makes the folder a workdir, or checks that it is one of this run."""
    config, folder, here = to_dict(task.config), task.folder, _environment()
    if origin is None and workdir.is_half_copied(folder):
        raise WorkdirError(f"{folder} is the copy of a --fork that was interrupted: repeat that")
    workdir.check(folder, config)  # again: until the lock was ours, others could write it
    if not (workdir.is_workdir(folder) and workdir.is_started(folder)):
        fork = {} if origin is None else {"forked_from": _fork(task, origin)}
        workdir.write_config(folder, config, here | fork)
        return
    there = flatten(workdir.read_config(folder))
    for name, value in flatten(here).items():
        if name in there and there[name] != value:
            _log.warning(
                "%s was started with %s %s, and goes on with %s: the last bits may differ from an "
                "undisturbed run's",
                folder,
                name,
                there[name],
                value,
            )


def _fork(task: Task, origin: Path) -> dict[str, Any]:
    """Copies the state of another workdir; what of it does not fit the configuration is not used.

    Returns:
        Where the new workdir comes from: the other one, what changed, and where that came from.
    """
    changes = workdir.config_changes(origin, to_dict(task.config))
    first = next(iter(STAGES.values()))
    lost = [name for name in changes if name.split(".")[0] in first.depends]
    if lost:
        raise ConfigError(
            f"--fork: nothing of {origin} can be kept when {', '.join(lost)} changes; start anew"
        )
    with workdir.locked(origin):
        workdir.copy_state(origin, task.folder)
        before = workdir.read_config(origin).get("forked_from")
    done, states = _stored(task.config, task.folder), task.folder / "checkpoints" / "search"
    fields = {*(STAGES["search"].state_depends or ())}
    same = "align" in done and not any({name, name.partition(".")[0]} & fields for name in changes)
    if "search" not in done and not same:
        shutil.rmtree(states, ignore_errors=True)
    goes_on = "search" not in done and any(states.glob("*"))
    changed = ", ".join(f"{name} is {here!r}" for name, (_, here) in changes.items())
    task.console.print(
        f"forked from {origin}{f', but {changed}' if changed else ''}: {_taken(done, goes_on)}",
        soft_wrap=True,
        highlight=False,
    )
    return {"workdir": str(origin), "changes": changes, "forked_from": before}


def _taken(done: Sequence[str], goes_on: bool) -> str:
    """What a copied workdir saves the run that goes on in it, in words."""
    words = [f"{', '.join(done)} taken from there"] if done else []
    if goes_on:
        words.append("the search goes on from its last checkpoint")
    return "; ".join([*words, "the rest is done anew"])


@contextlib.contextmanager
def _faults(name: str, stage: Stage, task: Task) -> Iterator[None]:
    """Turns what the device or the disk does to a stage into one line that says what to do."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        what = first_line(error) if str(error) else "of the host"
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what:
            raise DeviceError(
                f"{name}: out of memory ({what}); lower "
                f"{' or '.join(stage.lighter)}, or take a smaller model.options.dtype such as "
                "bfloat16. With --fork NEW_WORKDIR, what does not depend on it is kept"
            ) from error
        raise DeviceError(
            f"{name}: the device failed ({what}); the same command goes on from the last checkpoint"
        ) from error
    except WorkdirError:
        raise
    except OSError as error:
        file = error.filename or task.folder
        raise WorkdirError(f"{name}: {file} cannot be used: {error.strerror or error}") from error


def _environment() -> dict[str, Any]:
    """What the last bits of the results depend on, beside the configuration."""
    device = jax.devices()[0]
    return {
        "versions": {"megajax": megajax.__version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in _PACKAGES},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "number": jax.device_count(),
        },
        "cores": distributed.cores(),
        "x64": jax.config.read("jax_enable_x64"),
        "prng": str(jax.random.key_impl(jax.random.key(0))),
    }


def _show(console: Console, folder: Path, results: Mapping[str, Any]) -> None:
    show(report.summary(results, load_predictions(folder)), console)
