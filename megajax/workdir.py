"""The workdir of a run: which files there are, and how they are written so that none is ever half.

config.json       the resolved configuration, versions, device
metrics.jsonl     one line for each generation
merged/           the merged network: `load_network(workdir / "merged")`
results.json      the figures; its presence means that the run is finished
report.md, plots/ for people
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from megajax.errors import WorkdirError
from megajax.types import PyTree

__all__ = [
    "RESULTS",
    "append_lines",
    "finished",
    "flatten",
    "load_network",
    "open_workdir",
    "read_json",
    "save_network",
    "write_bytes",
    "write_json",
    "write_text",
]

RESULTS = "results.json"
_CONFIG = "config.json"
_NETWORK = "variables.msgpack"


def finished(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results of a finished run.

    Args:
        path: the workdir, which need not exist.
        config: the resolved configuration, as plain data.

    Returns:
        The content of `results.json`, or None if the run is not finished.

    Raises:
        WorkdirError: the workdir holds a run with another configuration; lists the fields.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> open_workdir(folder, {"seed": 0}, {"jax": "0.10.2"})
        >>> finished(folder, {"seed": 0})
        >>> finished(folder, {"seed": 1})
        Traceback (most recent call last):
        ...
        megajax.errors.WorkdirError: .../run holds a run with another configuration: seed is 0
        there, 1 here; choose another --workdir
    """
    if not (path / _CONFIG).exists():
        return None
    there, here = flatten(read_json(path / _CONFIG)["config"]), flatten(_plain(config))
    changed = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if changed:
        fields = ", ".join(
            f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in changed
        )
        raise WorkdirError(
            f"{path} holds a run with another configuration: {fields}; choose another --workdir"
        )
    if not (path / RESULTS).exists():
        return None
    results: dict[str, Any] = read_json(path / RESULTS)
    return results


def open_workdir(path: Path, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Creates a workdir, if need be, and writes `config.json`.

    Args:
        path: the folder.
        config: the resolved configuration, as plain data.
        environment: versions and device, written beside it.

    Raises:
        WorkdirError: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"workdir {path} cannot be written: {error.strerror}") from None
    write_json(path / _CONFIG, {"config": config, **environment})


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all (temporary name, fsync, rename).

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


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends one JSON line for each row.

    Raises:
        WorkdirError: it cannot be written.
    """
    text = "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows)
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        raise WorkdirError(f"{path} cannot be written: {error.strerror}") from None


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


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all (temporary name, fsync, rename).

    Raises:
        WorkdirError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise WorkdirError(f"{path} cannot be written: {error.strerror}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
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
