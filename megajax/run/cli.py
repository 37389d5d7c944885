"""The command line: flags and a config file in, one run out, every mistake one line.

    python -m megajax.run --config experiments/digits.py
    python -m megajax.run --config exp.py --config.evolution.population_size=64 --workdir DIR
    python -m megajax.run --config exp.py --seeds 0:5
    python -m megajax.run --config other.py --workdir OLD --fork NEW
    python -m megajax.run --config exp.py --distributed

The same command goes on where an interrupted one stopped. `--fork` starts a run with another
configuration from the state of an old one, which stays as it is. With `--distributed` several
processes, each started with this command, do one run together (docs/scaling.md). A config file is a
Python program: run only those you trust. A mistake in it, in a flag or in the data is one line on
the standard error and exit code 2. What a run does is in `megajax.run.pipeline`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from megajax import report
from megajax.config import Config, from_dict
from megajax.errors import ConfigError, Interrupted, MegajaxError, first_line
from megajax.evaluation.results import aggregate
from megajax.run import pipeline
from megajax.run import processes as distributed
from megajax.run import store as workdir

__all__ = ["main"]

_FLAGS = ("coordinator", "processes", "process")  # of --distributed
_RUNS_PER_CACHE = 20  # a process can hold the compiled programs of about a hundred


class _Run(NamedTuple):
    """One run that the command line asks for.

    Attributes:
        config: every choice.
        folder: its workdir.
        origin: the workdir that it starts from, if it is a fork.
        label: how its errors begin, where there are several runs.
    """

    config: Config
    folder: Path
    origin: Path | None
    label: str = ""


class _Cluster(NamedTuple):
    """The processes that do the runs together; None leaves it to the cluster's environment."""

    coordinator: str | None
    processes: int | None
    process: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m megajax.run`.

    Args:
        argv: program name and arguments; None takes the command line's.

    Returns:
        The exit code: 0; 2 for a mistake that could be named; 130 or 143 when interrupted.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    signals: list[int] = []
    agreed: list[int] = []  # of whichever process got one

    def stopping() -> bool:
        agreed.append(distributed.largest(signals[0] if signals else 0))
        return agreed[-1] > 0

    with _one_line_warnings(errors):
        try:
            runs, summary, cluster = _parse(list(sys.argv if argv is None else argv))
            if cluster is not None:
                distributed.connect(*cluster)
            with _collected(signals, errors):
                _do(runs, summary, stopping)
        except Interrupted as error:
            if distributed.is_first():
                errors.print(str(error))
            return 128 + agreed[-1]
        except MegajaxError as error:
            where = "" if distributed.is_first() else f"process {jax.process_index()}: "
            errors.print(f"{where}error: {error}")
            return 2
        except KeyboardInterrupt:
            errors.print("interrupted")
            return 128 + (signals[-1] if signals else signal.SIGINT)
    return 0


def _do(runs: Sequence[_Run], summary: Path | None, stopping: Callable[[], bool]) -> None:
    """Does the runs; finished ones are not done again. Several have a summary in the end."""
    console, results = Console(quiet=not distributed.is_first()), []
    for number, (config, folder, origin, label) in enumerate(runs, start=1):
        folders = [folder] if origin is None else [folder, origin]
        try:
            with distributed.own_folders(folders) as (own, *old):
                origin = old[0] if old else None
                results.append(pipeline.run(config, own, console, origin=origin, stopping=stopping))
        except MegajaxError as error:
            error.args = (f"{label}{error}",)
            raise
        if number % _RUNS_PER_CACHE == 0:
            jax.clear_caches()
    if summary is not None and distributed.is_first():
        combined = aggregate(results)
        report.write_report(summary.parent, combined)
        workdir.write_json(summary, combined)
        console.print(report.answer(combined), soft_wrap=True, highlight=False)
        console.print(f"all seeds: {summary}", soft_wrap=True)


def _parse(argv: list[str]) -> tuple[list[_Run], Path | None, _Cluster | None]:
    """The runs that the flags and their config file ask for, where a summary goes, and who runs."""
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
    for name, default, text in (
        ("workdir", None, "Folder of the run; runs/NAME-seedSEED if absent."),
        ("fork", None, "New folder, for a run that starts from the state of the one in --workdir."),
        ("seeds", None, "Several runs, in WORKDIR/seedSEED: FIRST:END (without END) or A,B,C."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    text = "One of several processes of one run; all are started with the same command."
    flags.DEFINE_bool("distributed", False, text, flag_values=values)
    text = "HOST:PORT of process 0, where the cluster's environment does not say it."
    flags.DEFINE_string("coordinator", None, text, flag_values=values)
    text = "How many processes there are; likewise."
    flags.DEFINE_integer("processes", None, text, flag_values=values)
    text = "The number of this process, from 0; likewise. The only flag that differs among them."
    flags.DEFINE_integer("process", None, text, flag_values=values)
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
        cluster = _cluster(values.distributed, config, *(values[name].value for name in _FLAGS))
    except (MegajaxError, SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a config file or a flag may raise
        raise ConfigError(_describe(error)) from None
    return *_plan(config, file.stem, values.workdir, values.fork, values.seeds), cluster


def _cluster(
    distributed: bool,
    config: Config,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> _Cluster | None:
    cluster = _Cluster(coordinator, processes, process)
    given = [value is not None for value in cluster]
    if not distributed:
        if any(given):
            raise ConfigError(f"--{_FLAGS[given.index(True)]} is given without --distributed")
        return None
    if any(given) and not all(given):
        raise ConfigError(f"--{_FLAGS[given.index(False)]} is missing: it takes all three or none")
    if config.evolution.time_budget is not None:
        raise ConfigError(
            f"evolution.time_budget is {config.evolution.time_budget}: with --distributed, whose "
            "processes have clocks of their own, it must be None"
        )
    return cluster


def _plan(
    config: Config, name: str, folder: str | None, fork: str | None, seeds: str | None
) -> tuple[list[_Run], Path | None]:
    default = Path("runs") / (f"{name}-seed{config.seed}" if seeds is None else name)
    old = default if folder is None else Path(folder)
    new, origin = (old, None) if fork is None else (Path(fork), old)
    if fork is not None and folder is None:
        raise ConfigError("--fork needs the --workdir to start from")
    if origin is not None and new.resolve() == origin.resolve():
        raise ConfigError(f"--fork {fork} is the --workdir itself: name a new folder")
    if seeds is None:
        return [_Run(config, new, origin)], None
    if workdir.is_workdir(new):
        raise ConfigError(f"--seeds: {new} holds a single run; choose another --workdir")
    return [
        _Run(
            dataclasses.replace(config, seed=seed),
            new / f"seed{seed}",
            None if origin is None else origin / f"seed{seed}",
            label=f"seed {seed}: ",
        )
        for seed in _seeds(seeds)
    ], new / workdir.RESULTS


def _seeds(text: str) -> list[int]:
    try:
        if ":" in text:
            first, end = map(int, text.split(":"))
            seeds = list(range(first, end))
        else:
            seeds = list(map(int, text.split(",")))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds is {text!r}: FIRST:END (without END) or A,B,C is needed")
    return seeds


@contextlib.contextmanager
def _collected(signals: list[int], errors: Console) -> Iterator[None]:
    """Collects SIGINT and SIGTERM, for the run to stop where it can save; a second one ends it."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt
        errors.print("stopping as soon as the state is saved; once more to stop at once")

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _one_line_warnings(errors: Console) -> Iterator[None]:
    """Shows the package's warnings as lines, and not what Orbax says where an error follows."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if distributed.is_first():
                errors.print(f"warning: {record.getMessage()}")

    def unraisablehook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # Orbax's threads, after the error
            hook(unraisable)

    ours, orbax, handler = logging.getLogger("megajax"), logging.getLogger("absl"), Handler()
    before = orbax.level, ours.propagate
    hook, sys.unraisablehook = sys.unraisablehook, unraisablehook
    ours.addHandler(handler)
    ours.propagate = False
    orbax.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        ours.removeHandler(handler)
        orbax.setLevel(before[0])
        ours.propagate = before[1]


def _describe(error: Exception) -> str:
    """One line on what went wrong, with the place in the config file where there is one."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, flags.Error):
        cause: BaseException = error
        while (before := cause.__cause__ or cause.__context__) is not None:
            cause = before
        # Of a config file the library only says that it failed.
        return f"{message} {first_line(cause)}" if message.endswith(":") else message
    if isinstance(error, AttributeError) and "'get_config'" in message:
        return "the config file has no function get_config()"
    packages = (str(Path(module.__file__ or "").parent) for module in (flags, config_flags, jax))
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if last.filename.startswith(tuple(packages)) else f"{last.filename}, line "
    where += f"{last.lineno}: " if where else ""
    return f"{where}{type(error).__name__}: {message}"


def make_cores_devices() -> None:
    """Makes a device of each core, unless the environment says how many there are to be.

    XLA does not keep several cores busy with one network: two cores score twice as many if each has
    networks of its own (benchmarks/population.py). Only CPUs are concerned.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", cores or 1)
