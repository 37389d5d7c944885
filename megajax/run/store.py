"""The workdir of a run: which files there are, and what of them a later start may rely on.

config.json       the resolved configuration, and what the bits of the results depend on
stages/           what each finished stage found: figures, and which files hold the rest
checkpoints/      the state of a stage under way, to go on from
parents/0, ...    the parents; aligned/0, ... the same with hidden units in correspondence
metrics.jsonl     one line for each generation
merged/           the merged network: `megajax.load_network(workdir / "merged")`
results.json      the figures; its presence means that the run is finished
report.md, plots/ for people
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megajax.errors import MegajaxError, WorkdirError
from megajax.formats import FORMATS, load_network, save_network
from megajax.io import digest, faults_of, file_digest, flatten, read_json, write_json
from megajax.types import PyTree

__all__ = [
    "METRICS",
    "RESULTS",
    "Outcome",
    "check",
    "config_changes",
    "copy_state",
    "is_half_copied",
    "is_started",
    "is_workdir",
    "load_outcome",
    "locked",
    "read_config",
    "save_outcome",
    "write_config",
]

RESULTS = "results.json"
METRICS = "metrics.jsonl"
_CONFIG = "config.json"
_LOCK = ".lock"
_COPYING = ".copying"
_NETWORK = FORMATS["msgpack"].files[0]
_DIGEST = "sha256"  # of the rest, in the files that are not for people
_FREE = "checkpoint."  # fields that may differ: they have no influence on the result


class Outcome(NamedTuple):
    """What a stage of a run found.

    Attributes:
        networks: folder in the workdir -> variables.
        values: figures, as plain data.
        files: names of other files that it left in the workdir.
        seconds: how long it took; None lets the clock decide.
        identity: of all that went into it and came out of it; given when it is stored.
    """

    networks: Mapping[str, PyTree] = {}
    values: Mapping[str, Any] = {}
    files: Sequence[str] = ()
    seconds: float | None = None
    identity: str = ""


def check(folder: Path, config: Mapping[str, Any]) -> None:
    """Checks that a folder is free, or holds a run with this configuration.

    A run that has found nothing yet stands in nobody's way.

    Args:
        folder: the workdir, which need not exist.
        config: the resolved configuration, as plain data.

    Raises:
        WorkdirError: it holds other things, or a run with another configuration (lists the
            fields), or its `config.json` is damaged.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> check(folder, {"seed": 0})
        >>> write_config(folder, {"seed": 0}, {"jax": "0.10.2"})
        >>> save_outcome(folder, "parents", "key", Outcome())
        >>> check(folder, {"seed": 1})
        Traceback (most recent call last):
        ...
        megajax.errors.WorkdirError: .../run holds a run with another configuration: seed is 0
        there, 1 here; choose another --workdir, or start one from its state: --fork NEW_WORKDIR
    """
    if not is_workdir(folder):
        there = folder.iterdir() if folder.is_dir() else iter(())
        if not is_half_copied(folder) and any(path.name[0] != "." for path in there):
            raise WorkdirError(
                f"{folder} is neither empty nor the workdir of a run: choose another --workdir"
            )
        return
    changed = config_changes(folder, config) if is_started(folder) else {}
    if changed:
        fields = ", ".join(
            f"{name} is {there!r} there, {here!r} here" for name, (there, here) in changed.items()
        )
        raise WorkdirError(
            f"{folder} holds a run with another configuration: {fields}; choose another "
            "--workdir, or start one from its state: --fork NEW_WORKDIR"
        )


def is_workdir(folder: Path) -> bool:
    """Whether a run was started in a folder."""
    return (folder / _CONFIG).exists()


def is_started(folder: Path) -> bool:
    """Whether a run has found anything that would be lost."""
    found = ((folder / part).rglob("*") for part in ("stages", "checkpoints"))
    return any(path.is_file() for paths in found for path in paths)


def is_half_copied(folder: Path) -> bool:
    """Whether `copy_state` was interrupted."""
    return (folder / _COPYING).exists() and not is_workdir(folder)


def config_changes(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which a workdir's configuration differs from another: name -> (there, here).

    Raises:
        WorkdirError: there is no configuration in it that can be read.
    """
    there, here = flatten(read_config(folder)["config"]), flatten(_as_json(config))
    return {
        name: (there.get(name), here.get(name))
        for name in {**here, **there}
        if there.get(name) != here.get(name) and not name.startswith(_FREE)
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        WorkdirError: it cannot be read or is damaged.
    """
    path = folder / _CONFIG
    try:
        return _unsealed(path)
    except WorkdirError as error:
        hint = "; delete it to go on with the configuration given" if path.exists() else ""
        raise WorkdirError(f"{error}{hint}") from None


def write_config(folder: Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Makes a folder a workdir: writes `config.json`.

    Args:
        folder: made if need be.
        config: the resolved configuration, as plain data.
        about: written beside it: versions, device, origin.

    Raises:
        WorkdirError: it cannot be written.
    """
    _write_sealed(folder / _CONFIG, {**about, "config": config})
    (folder / _COPYING).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a workdir, which is made if need be.

    The operating system lets go of the lock when the process ends, however it ends.

    Raises:
        WorkdirError: another process holds the lock, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with locked(folder), locked(folder):
        ...     pass
        Traceback (most recent call last):
        ...
        megajax.errors.WorkdirError: another process (...) is at work in ...
    """
    with faults_of(f"workdir {folder}", "written"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(100).strip()
            raise WorkdirError(f"another process ({holder}) is at work in {folder}") from None
        except OSError as error:
            raise WorkdirError(f"workdir {folder} cannot be locked: {error.strerror}") from None
        with contextlib.suppress(OSError):  # only for the message above
            file.truncate(0)
            file.write(f"number {os.getpid()} on {os.uname().nodename}")
            file.flush()
        yield


def copy_state(old: Path, new: Path) -> None:
    """Copies what a run has done so far; the copy is finished when `write_config` gives it a name.

    Raises:
        WorkdirError: a file cannot be read or written.
    """
    leave = shutil.ignore_patterns(_CONFIG, _LOCK, RESULTS, "*.partial", "report.*", "plots")
    try:
        new.mkdir(parents=True, exist_ok=True)
        (new / _COPYING).touch()
        shutil.copytree(old, new, ignore=leave, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise WorkdirError(f"{old} cannot be copied to {new}: {error}") from None


def save_outcome(folder: Path, name: str, key: str, outcome: Outcome) -> None:
    """Stores the outcome of a stage. The record of it comes last and says that all is there.

    Args:
        folder: the workdir.
        name: of the stage.
        key: of all that went into it.
        outcome: what it found.

    Raises:
        WorkdirError: a file cannot be written.
    """
    for network, variables in outcome.networks.items():
        with _as_workdir():
            save_network(folder / network, variables)
    files = [*(f"{network}/{_NETWORK}" for network in outcome.networks), *outcome.files]
    record = {
        "key": key,
        "values": outcome.values,
        "seconds": outcome.seconds,
        "networks": list(outcome.networks),
        "files": {file: file_digest(folder / file) for file in files},
    }
    _write_sealed(_record(folder, name), record)


def load_outcome(folder: Path, name: str, key: str) -> Outcome | None:
    """The stored outcome of a stage, checked for damage.

    Args:
        folder: the workdir.
        name: of the stage.
        key: of all that would go into it.

    Returns:
        The outcome, networks made of dictionaries and NumPy arrays; None if there is none, or one
        with another key, or a file of it was removed.

    Raises:
        WorkdirError: a file of it is damaged; names the file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_outcome(folder, "search", "key", Outcome(values={"fitness": 0.5}))
        >>> load_outcome(folder, "search", "key").values
        {'fitness': 0.5}
        >>> load_outcome(folder, "search", "other"), load_outcome(folder, "measure", "key")
        (None, None)
    """
    if not _record(folder, name).exists():
        return None
    record = _unsealed(_record(folder, name))
    if record["key"] != key or not all((folder / file).exists() for file in record["files"]):
        return None
    for file, noted in record["files"].items():
        if file_digest(folder / file) != noted:
            raise WorkdirError(f"{folder / file} is damaged")
    with _as_workdir():
        networks = {
            network: load_network(folder / network / _NETWORK) for network in record["networks"]
        }
    files = [file for file in record["files"] if Path(file).parent.as_posix() not in networks]
    identity = digest([key, record["values"], record["files"]])
    return Outcome(networks, record["values"], files, record["seconds"], identity)


def _record(folder: Path, name: str) -> Path:
    return folder / "stages" / f"{name}.json"


def _write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    write_json(path, {**value, _DIGEST: digest(value)})


def _unsealed(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict) or value.pop(_DIGEST, None) != digest(value):
        raise WorkdirError(f"{path} is damaged")
    return value


def _as_json(value: Mapping[str, Any]) -> Any:
    """Lists for tuples, as a file has it."""
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def _as_workdir() -> Iterator[None]:
    try:
        yield
    except WorkdirError:
        raise
    except MegajaxError as error:
        raise WorkdirError(str(error)) from None
