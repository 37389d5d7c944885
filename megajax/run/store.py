"""The workdir of a run: which files there are, and how they are written so that none is ever half.

config.json       the resolved configuration, versions, device
stages/           what each finished stage found: figures, and which files hold the rest
checkpoints/      the state of a stage under way, to go on from
parents/0, ...    the parents; aligned/0, ... the same with hidden units in correspondence
metrics.jsonl     one line for each generation
merged/           the merged network: `load_network(workdir / "merged")`
results.json      the figures; its presence means that the run is finished
report.md, plots/ for people
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from megajax.errors import WorkdirError
from megajax.io import file_digest, write_bytes
from megajax.types import PyTree

__all__ = [
    "METRICS",
    "PLAN",
    "RESULTS",
    "Outcome",
    "check_config",
    "config_changes",
    "copy_state",
    "copy_whole",
    "digest",
    "flatten",
    "is_half_copied",
    "is_workdir",
    "load_network",
    "load_outcome",
    "locked",
    "read_config",
    "read_json",
    "read_lines",
    "save_network",
    "save_outcome",
    "write_config",
    "write_json",
    "write_lines",
    "write_text",
]

RESULTS = "results.json"
METRICS = "metrics.jsonl"
PLAN = "plan.json"
_CONFIG = "config.json"
_LOCK = ".lock"
_COPYING = ".copying"
_NETWORK = "variables.msgpack"
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


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Checks that a workdir is free or holds a run with this configuration.

    Args:
        folder: the workdir, which need not exist.
        config: the resolved configuration, as plain data.

    Raises:
        WorkdirError: it holds a run with another configuration (lists the fields), or its
            `config.json` is damaged.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> check_config(folder, {"seed": 0})
        >>> write_config(folder, {"seed": 0}, {"jax": "0.10.2"})
        >>> check_config(folder, {"seed": 1})
        Traceback (most recent call last):
        ...
        megajax.errors.WorkdirError: .../run holds a run with another configuration: seed is 0
        there, 1 here; choose another --workdir, or start one from its state: --fork NEW_WORKDIR
    """
    if not is_workdir(folder):
        return
    changed = config_changes(folder, config)
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


def is_half_copied(folder: Path) -> bool:
    """Whether `copy_state` was interrupted."""
    return (folder / _COPYING).exists() and not is_workdir(folder)


def config_changes(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which a workdir's configuration differs from another: name -> (there, here).

    Raises:
        WorkdirError: there is no configuration in it that can be read.
    """
    there, here = flatten(read_config(folder)["config"]), flatten(_plain(config))
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
    """Keeps other processes out of a workdir, which is made if need be.

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a+")
    except OSError as error:
        raise WorkdirError(f"workdir {folder} cannot be written: {error.strerror}") from None
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
    _copy(old, new, leave=(_CONFIG, PLAN, RESULTS, "report.*", "plots"))


def copy_whole(old: Path, new: Path) -> None:
    """Copies a workdir with all that there is, so that a run goes on in the copy as in the first.

    Args:
        old: the workdir; nobody may be at work there.
        new: made if need be.

    Raises:
        WorkdirError: a file cannot be read or written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_config(folder / "old", {"seed": 0}, {})
        >>> copy_whole(folder / "old", folder / "new")
        >>> read_config(folder / "new")["config"]
        {'seed': 0}
    """
    _copy(old, new)
    (new / _COPYING).unlink(missing_ok=True)


def _copy(old: Path, new: Path, leave: Sequence[str] = ()) -> None:
    ignore = shutil.ignore_patterns(_LOCK, "*.partial", *leave)
    try:
        new.mkdir(parents=True, exist_ok=True)
        (new / _COPYING).touch()
        shutil.copytree(old, new, ignore=ignore, dirs_exist_ok=True)
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
    networks = {network: load_network(folder / network) for network in record["networks"]}
    files = [file for file in record["files"] if Path(file).parent.as_posix() not in networks]
    identity = digest([key, record["values"], record["files"]])
    return Outcome(networks, record["values"], files, record["seconds"], identity)


def digest(value: Any) -> str:
    """The SHA-256 digest of plain data.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    text = json.dumps(_plain(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        WorkdirError: it cannot be written.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; numbers that are not finite become null.

    Raises:
        WorkdirError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.json"
        >>> write_json(path, {"nll": float("nan"), "accuracy": np.float32(0.5)})
        >>> read_json(path)
        {'nll': None, 'accuracy': 0.5}
    """
    write_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        WorkdirError: the file cannot be read or is damaged.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged: {error}") from None


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]], *, append: bool = False) -> None:
    """Writes one JSON line for each row, in place of the file or at its end.

    Only the whole file is written so that it is never half; a line at the end may be.

    Raises:
        WorkdirError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.jsonl"
        >>> write_lines(path, [{"generation": 0}])
        >>> write_lines(path, [{"generation": 1}], append=True)
        >>> read_lines(path)
        [{'generation': 0}, {'generation': 1}]
    """
    text = "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows)
    if not append:
        write_text(path, text)
        return
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        raise WorkdirError(f"{path} cannot be written: {error.strerror}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line.

    Raises:
        WorkdirError: the file cannot be read or is damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged: {error}") from None


def save_network(folder: Path, variables: PyTree) -> None:
    """Saves the variables of one network, as Flax msgpack.

    Args:
        folder: made if need be; it then holds `variables.msgpack`.
        variables: pytree of arrays in containers that Flax can serialise.

    Raises:
        WorkdirError: it cannot be written.
    """
    state = serialization.to_state_dict(jax.device_get(variables))
    write_bytes(folder / _NETWORK, serialization.msgpack_serialize(state))


def load_network(folder: Path | str, like: PyTree | None = None) -> PyTree:
    """Loads a network saved by `save_network`, such as a run's `merged` folder.

    Args:
        folder: where it was saved.
        like: variables of the same structure; given, the result has its containers. Otherwise it is
            made of dictionaries.

    Returns:
        The variables, NumPy arrays.

    Raises:
        WorkdirError: the file cannot be read, is damaged, or does not fit `like`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_network(folder, {"params": {"kernel": np.eye(2)}})
        >>> load_network(folder)["params"]["kernel"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    path = Path(folder) / _NETWORK
    try:
        state = serialization.msgpack_restore(path.read_bytes())
        return state if like is None else serialization.from_state_dict(like, state)
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # msgpack and flax raise many kinds for damaged bytes
        raise WorkdirError(f"{path} is damaged or does not fit: {error}") from None


def _record(folder: Path, name: str) -> Path:
    return folder / "stages" / f"{name}.json"


def _write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    write_json(path, {**value, _DIGEST: digest(value)})


def _unsealed(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict) or value.pop(_DIGEST, None) != digest(value):
        raise WorkdirError(f"{path} is damaged")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots.

    Example:
        >>> flatten({"data": {"name": "digits"}, "seed": 0})
        {'data.name': 'digits', 'seed': 0}
    """
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
