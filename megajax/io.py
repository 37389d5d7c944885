"""Files that are whole or absent and known by their digests: bytes, JSON, lines of JSON, arrays.

Knows the disk and plain data; what is written where is up to the rooms above.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megajax.errors import WorkdirError, first_line

__all__ = [
    "digest",
    "faults_of",
    "file_digest",
    "flatten",
    "pack",
    "read_json",
    "read_lines",
    "sync",
    "unpack",
    "write_bytes",
    "write_json",
    "write_lines",
    "write_text",
]


@contextlib.contextmanager
def faults_of(path: Path | str, done: str) -> Iterator[None]:
    """Turns what the disk does to a file into one line that names it.

    Args:
        path: the file, or what to call it.
        done: what is done to it inside: `read`, `written`.

    Raises:
        WorkdirError: it failed.

    Example:
        >>> with faults_of(Path("a.json"), "read"):
        ...     raise OSError(2, "No such file or directory")
        Traceback (most recent call last):
        ...
        megajax.errors.WorkdirError: a.json cannot be read: No such file or directory
    """
    try:
        yield
    except OSError as error:
        raise WorkdirError(f"{path} cannot be {done}: {error.strerror or error}") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and so that it outlives a power cut.

    Args:
        path: its folder is made if need be.
        data: the content.

    Raises:
        WorkdirError: it cannot be written; names the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "folder" / "file"
        >>> write_bytes(path, b"content")
        >>> path.read_bytes()
        b'content'
    """
    temporary = path.with_name(f".{path.name}.partial")
    with faults_of(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Brings what was written to a file, or the list of a folder's files, to the disk.

    Raises:
        OSError: the disk failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The SHA-256 digest of a file, as `sha256sum` prints it.

    Raises:
        WorkdirError: it cannot be read; names the file.
    """
    with faults_of(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    return _parsed(path, json.loads)


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
    with faults_of(path, "written"), path.open("a") as file:
        file.write(text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line.

    Raises:
        WorkdirError: the file cannot be read or is damaged.
    """
    return _parsed(path, lambda text: list(map(json.loads, text.splitlines())))


def pack(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> bytes:
    """Arrays of any dtype, and plain data about them, as the bytes of a safetensors file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.safetensors"
        >>> write_bytes(path, pack({"a": np.float64(0.5), "b": np.ones((0, 2), bool)}, {"step": 3}))
        >>> arrays, about = unpack(path)
        >>> arrays["a"], arrays["b"].shape, about
        (array(0.5), (0, 2), {'step': 3})
    """
    from safetensors.numpy import save

    plain, others = {}, {}
    for name, array in arrays.items():
        plain[name] = array = np.asarray(array)
        if array.dtype.isbuiltin != 1 or array.dtype.kind not in "biuf":  # bfloat16, complex, ...
            others[name] = [array.dtype.name, array.shape]
            plain[name] = np.frombuffer(array.tobytes(), np.uint8)
    return save(plain, {"about": json.dumps([others, _plain(about)])})


def unpack(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays of a file made by `pack`, and what is said about them.

    Raises:
        WorkdirError: the file cannot be read or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with faults_of(path, "read"), safe_open(path, "numpy") as file:
            others, about = json.loads(file.metadata()["about"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, (dtype, shape) in others.items():
            arrays[name] = np.frombuffer(arrays[name].tobytes(), np.dtype(dtype)).reshape(shape)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise WorkdirError(f"{path} is damaged: {first_line(error)}") from None
    return arrays, about


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        with faults_of(path, "read"):
            return parse(path.read_text())
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged: {error}") from None


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
