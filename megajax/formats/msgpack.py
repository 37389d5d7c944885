"""Flax msgpack: nested dictionaries of arrays, as `flax.serialization.to_bytes` writes them.

No code can hide in it. The arrays it says it holds cannot be larger than the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization

from megajax.errors import InterchangeError, first_line
from megajax.formats.files import Spec, Stored, read_bytes, write_bytes
from megajax.formats.trees import native, nested

__all__ = ["open_msgpack", "write_msgpack"]

_NOT_AN_ARRAY = np.dtype(object)
_ALLOWANCE = 64 * 2**20


def open_msgpack(path: Path, nbytes: int | None = None) -> Stored:
    """Opens a msgpack file.

    Args:
        path: of the file.
        nbytes: size of the network in memory; a file that is more than eight times as large (an
            optimizer's state included) is not read.

    Returns:
        What it holds; a value that is no array has the dtype `object`.

    Raises:
        InterchangeError: it cannot be read, is damaged, or is far too large.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "variables.msgpack"
        >>> write_msgpack(path, {("params", "w"): np.ones(2, np.float32)})
        >>> {name: str(spec) for name, spec in open_msgpack(path).specs.items()}
        {'params/w': 'float32[2]'}
    """
    size = path.stat().st_size if path.is_file() else 0
    if nbytes is not None and size > 8 * nbytes + _ALLOWANCE:
        raise InterchangeError(f"{path} has {size} bytes: the network needs about {nbytes}")
    data = read_bytes(path)
    try:
        tree = serialization.msgpack_restore(data)
    except Exception as error:  # msgpack and flax raise many kinds for damaged bytes
        raise InterchangeError(
            f"{path} is no msgpack file, or damaged: {first_line(error)}"
        ) from None
    values: dict[str, Any] = {}
    if not isinstance(tree, (dict, list, tuple)):
        raise InterchangeError(f"{path} holds a {type(tree).__name__} instead of named arrays")
    for keys, value in _flat(tree, ()):
        name = "/".join(keys)
        if name in values:
            raise InterchangeError(f"{path} has two leaves called {name}")
        values[name] = value

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        return {name: native(np.asarray(values[name])) for name in names}

    return Stored(path, {name: _spec(value) for name, value in values.items()}, read)


def write_msgpack(path: Path, arrays: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """Writes a msgpack file.

    Args:
        path: of the file.
        arrays: keys that lead to each array -> the array.

    Raises:
        InterchangeError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "variables.msgpack"
        >>> write_msgpack(path, {("params", "w"): np.ones(2)})
        >>> serialization.msgpack_restore(path.read_bytes())
        {'params': {'w': array([1., 1.])}}
    """
    data = serialization.msgpack_serialize(nested(arrays))
    write_bytes(path, data)


def _flat(tree: Any, keys: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """Leaves and their keys; without recursion, so that no nesting is too deep."""
    found, todo = [], [(keys, tree)]
    while todo:
        at, value = todo.pop()
        if isinstance(value, dict):
            todo += [((*at, str(key)), item) for key, item in reversed(value.items())]
        elif isinstance(value, (list, tuple)):
            todo += [((*at, str(i)), item) for i, item in reversed([*enumerate(value)])]
        else:
            found.append((at, value))
    return found


def _spec(value: Any) -> Spec:
    if isinstance(value, (np.ndarray, np.generic)):
        return Spec(tuple(value.shape), value.dtype)
    if isinstance(value, (bool, int, float, complex)):
        return Spec((), np.asarray(value).dtype)
    return Spec((), _NOT_AN_ARRAY)
