"""Trains networks, merges them and measures the result, as a config file says.

    python -m megajax.run --config experiments/digits.py
    python -m megajax.run --config exp.py --config.evolution.population_size=64 --workdir DIR
    python -m megajax.run --config exp.py --seeds 0:5
    python -m megajax.run --config other.py --workdir OLD --fork NEW
    python -m megajax.run --config exp.py --distributed

A config file is a Python program with a function get_config() that returns a megajax.Config; run
only files that you trust. `exp.py:word` calls get_config("word"). Ctrl-C stops a run as soon as its
state is saved, and the same command continues it. A mistake in a flag, in the config file or in the
data is reported in one line on the standard error, with exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import jax
from rich.console import Console

from megajax import report
from megajax.errors import (
    ConfigError,
    DeviceError,
    Interrupted,
    MegajaxError,
    did_you_mean,
    first_line,
)
from megajax.evaluation.results import aggregate
from megajax.io import write_json
from megajax.report.page import show
from megajax.run import pipeline
from megajax.run import processes as distributed
from megajax.run import store as workdir
from megajax.run.config import Config, override, smoke
from megajax.sections import fields

__all__ = ["load_config", "main", "make_cores_devices"]

_FLAGS = {
    "config": ("FILE[:WORD]", "the config file, and an argument for its get_config()"),
    "workdir": ("DIR", "folder of the run; runs/NAME-seedSEED if it is not given"),
    "fork": ("NEW", "start another run, in NEW, from the state of the one in --workdir"),
    "seeds": ("SEEDS", "a run for each seed, in DIR/seedSEED: FIRST:END (without END) or A,B,C"),
    "distributed": (None, "this is one of several processes that do one run together"),
    "coordinator": (
        "HOST:PORT",
        "address of process 0, if the cluster's environment does not give it",
    ),
    "processes": ("N", "number of processes, if the cluster's environment does not give it"),
    "process": ("I", "number of this process, from 0; the only flag that differs between them"),
    "help": (None, "show this text"),
}
_ABOUT_FIELDS = (
    "Fields of the configuration, as --config.SECTION.FIELD=VALUE, with their defaults. A value is "
    "read according to its field: None, a number, a name, or several names as a,b."
)
_RUNS_PER_CACHE = 20  # a process can hold the compiled programs of about a hundred


class _Run(NamedTuple):
    """One run: its configuration and workdir, where it is forked from, and its errors' start."""

    config: Config
    folder: Path
    origin: Path | None
    label: str = ""


class _Order(NamedTuple):
    """What the command line asks for: runs, where a summary of them goes, and who does them.

    The latter is what `megajax.run.processes.connect` takes, or None for this process alone.
    """

    runs: list[_Run]
    summary: Path | None
    cluster: list[Any] | None


def main(
    argv: Sequence[str] | None = None,
    do: Callable[[Any, Callable[[], bool]], None] | None = None,
    about: str = "",
) -> int:
    """The command `python -m megajax.run`.

    Args:
        argv: program name and arguments; None takes the command line's.
        do: what else to do with the runs that are asked for, and a function that says when to stop.
        about: the text above the flags that `--help` shows for it.

    Returns:
        The exit code: 0; 2 for a mistake that could be named; 130 or 143 when interrupted.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    signals: list[int] = []
    agreed: list[int] = []  # of whichever process got one

    def stopping() -> bool:
        agreed.append(distributed.largest(signals[0] if signals else 0))
        return agreed[-1] > 0

    try:
        with _one_line_warnings(errors):
            order = _parse(list(sys.argv if argv is None else argv)[1:], about or __doc__)
            if order is None:
                return 0
            if order.cluster is not None:
                distributed.connect(*order.cluster)
            with _collected(signals, errors):  # after JAX, which has a handler for SIGTERM too
                _find_devices()
                (do or _do)(order, stopping)
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


def load_config(place: str) -> Config:
    """What the `get_config()` of a file returns. Its neighbours can be imported by it.

    Args:
        place: the file, with `:WORD` for `get_config("WORD")`.

    Raises:
        ConfigError: there is no such file or function, or it fails; names the line.
    """
    name, _, word = place.partition(":")
    file = Path(name).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"config file {name} does not exist")
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = types.ModuleType("__config__")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"{name}: the config file has no function get_config()")
        config = module.get_config(*([word] if word else []))
    except MegajaxError:
        raise
    except Exception as error:  # whatever a program may raise
        raise ConfigError(_place_and_reason(error, file)) from None
    if not isinstance(config, Config):
        raise ConfigError(
            f"{name}: get_config() returned {type(config).__name__}: a megajax.Config is needed"
        )
    return config


def make_cores_devices() -> None:
    """Makes a device of each core, unless the environment says how many there are to be.

    XLA does not keep several cores busy with one network: two cores score twice as many if each has
    networks of its own (benchmarks/population.py). Only CPUs are concerned.
    """
    by_flag = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if by_flag or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    jax.config.update("jax_num_cpu_devices", distributed.cores())


def _do(order: _Order, stopping: Callable[[], bool]) -> None:
    """Does the runs; finished ones are not done again. Several have a summary in the end."""
    console, results = Console(quiet=not distributed.is_first()), []
    for number, (config, folder, origin, label) in enumerate(order.runs, start=1):
        try:
            results.append(pipeline.run(config, folder, console, origin=origin, stopping=stopping))
        except MegajaxError as error:
            error.args = (f"{label}{error}",)
            raise
        if number % _RUNS_PER_CACHE == 0:
            jax.clear_caches()
    if order.summary is not None and distributed.is_first():
        combined = aggregate(results)
        report.write_report(order.summary.parent, combined)
        write_json(order.summary, combined)
        show(report.summary(combined), console)
        console.print(f"all seeds: {order.summary}", soft_wrap=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _parse(arguments: list[str], about: str) -> _Order | None:
    """What is asked for; None if it was help, which is given."""
    changes, rest = _overrides(arguments)
    parser = _Parser(prog="python -m megajax.run", add_help=False, allow_abbrev=False)
    for name, (value, _) in _FLAGS.items():
        short = ["-h"] if name == "help" else []
        kind: dict[str, Any] = {} if value else {"action": "store_true"}
        if name in ("processes", "process"):
            kind["type"] = int
        parser.add_argument(f"--{name}", *short, **kind)
    given, unknown = parser.parse_known_args(rest)
    if given.help:
        print(_help(about))
        return None
    if unknown:
        flags = [f"--{name}" for name in _FLAGS]
        hint = did_you_mean(unknown[0].partition("=")[0], flags, "see --help")
        raise ConfigError(f"{unknown[0]!r} is not a flag; {hint}")
    if given.config is None:
        raise ConfigError("--config FILE is missing; see --help")
    config = override(load_config(given.config), changes)
    config = smoke(config) if config.smoke else config
    cluster = _cluster(given, config)
    file, _, word = given.config.partition(":")
    name = Path(file).stem + (f"-{re.sub(r'[^a-zA-Z0-9_.=]+', '-', word)}" if word else "")
    return _Order(*_plan(config, name, given.workdir, given.fork, given.seeds), cluster)


def _overrides(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The fields that are set, as texts, and the other arguments."""
    changes, rest = {}, []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        field, given, value = argument.removeprefix("--config.").partition("=")
        if not given:  # `--config.smoke`, or the value is the next argument
            value = left.pop(0) if left and not left[0].startswith("--") else "True"
        changes[field] = value
    return changes, rest


def _cluster(given: argparse.Namespace, config: Config) -> list[Any] | None:
    cluster = {name: getattr(given, name) for name in ("coordinator", "processes", "process")}
    there = [name for name, value in cluster.items() if value is not None]
    missing = [name for name in cluster if name not in there]
    if there and not given.distributed:
        raise ConfigError(f"--{there[0]} is given without --distributed")
    if there and missing:
        raise ConfigError(f"--{missing[0]} is missing: it takes all three or none")
    if not given.distributed:
        return None
    why = "with --distributed, whose processes have clocks of their own, it must be None"
    config.evolution.require(config.evolution.time_budget is None, "time_budget", why)
    return list(cluster.values())


def _plan(
    config: Config, name: str, folder: str | None, fork: str | None, seeds: str | None
) -> tuple[list[_Run], Path | None]:
    default = Path("runs") / (f"{name}-seed{config.seed}" if seeds is None else name)
    old = default if folder is None else Path(folder).expanduser()
    new, origin = (old, None) if fork is None else (Path(fork).expanduser(), old)
    if fork is not None and folder is None:
        raise ConfigError("--fork needs the --workdir to start from")
    if origin is not None and new.resolve() == origin.resolve():
        raise ConfigError(f"--fork {fork} is the --workdir itself: name a new folder")
    if seeds is None:
        return [_Run(config, new, origin)], None
    if workdir.is_workdir(new):
        raise ConfigError(f"--seeds: {new} holds a single run; choose another --workdir")
    runs = [
        _Run(
            config.replace(seed=seed),
            new / f"seed{seed}",
            None if origin is None else origin / f"seed{seed}",
            label=f"seed {seed}: ",
        )
        for seed in _seeds(seeds)
    ]
    return runs, new / workdir.RESULTS


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


def _help(about: str) -> str:
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)

    def indented(text: str, by: int) -> str:
        return textwrap.fill(text, width, initial_indent=" " * by, subsequent_indent=" " * by)

    parts = [about.rstrip(), "", "Flags:"]
    for name, (value, meaning) in _FLAGS.items():
        parts += [f"  --{name} {value or ''}".rstrip(), indented(meaning + ".", 6)]
    parts += ["", indented(_ABOUT_FIELDS, 0)]
    for section, own in itertools.groupby(fields(Config), key=lambda f: f.name.partition(".")[0]):
        kind = Config.model_fields[section].annotation
        head = [] if kind in (int, bool) or not hasattr(kind, "section") else [kind.__doc__ or ""]
        parts += ["", *(indented(text.splitlines()[0], 0) for text in head)]
        for field in own:
            parts.append(f"  --config.{field.name}={field.default}")
            parts.append(indented(f"{field.meaning} Takes {field.kind}.", 6))
    return "\n".join(parts)


def _find_devices() -> None:
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter says nothing
        wanted = os.environ.get("JAX_PLATFORMS", "")
        why = str(error) and f" ({first_line(error)})"
        raise DeviceError(
            f"JAX finds no device to work on; JAX_PLATFORMS is {wanted!r}{why}"
        ) from None


@contextlib.contextmanager
def _collected(signals: list[int], errors: Console) -> Iterator[None]:
    """Collects SIGINT and SIGTERM, for the run to stop where it can save; a second one ends it.

    Outside the main thread, where Python allows no handlers, whoever owns that one decides.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

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
    """Shows the package's warnings as lines."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if distributed.is_first():
                errors.print(f"warning: {record.getMessage()}")

    ours, handler = logging.getLogger("megajax"), Handler()
    before = ours.propagate
    ours.addHandler(handler)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.propagate = before


def _place_and_reason(error: Exception, file: Path) -> str:
    """One line on what went wrong, with the place in the config file."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    inside = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    where = f"{file}, line {inside[-1].lineno}" if inside else str(file)
    return f"{where}: {type(error).__name__}: {first_line(error)}"
