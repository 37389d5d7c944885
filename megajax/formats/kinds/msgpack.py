"""Flax msgpack: nested dictionaries of arrays, as `flax.serialization.to_bytes` writes them.

No code can hide in it. The arrays it says it holds cannot be larger than the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megajax.errors import InterchangeError
from megajax.formats.arrays import NOT_AN_ARRAY, Format, Keyed, Spec, Stored, native, nested
from megajax.formats.disk import one_line, write_whole
from megajax.trees import leaves_by_path

__all__ = ["FORMAT"]


def _open(path: Path) -> Stored:
    from flax import serialization

    with one_line(path, "is no msgpack file, or damaged"):
        tree = serialization.msgpack_restore(path.read_bytes())
        values = leaves_by_path(tree)
    if not isinstance(tree, (dict, list, tuple)):
        raise InterchangeError(f"{path} holds a {type(tree).__name__} instead of named arrays")
    if len(values) < len(jax.tree.leaves(tree)):
        raise InterchangeError(f"{path} has two leaves of the same name")

    def read(names: Sequence[str]) -> dict[str, np.ndarray]:
        return {name: native(np.asarray(values[name])) for name in names}

    return Stored(path, {name: _spec(value) for name, value in values.items()}, read)


def _write(path: Path, arrays: Keyed) -> None:
    from flax import serialization

    write_whole(path, serialization.msgpack_serialize(nested(arrays)))


def _spec(value: Any) -> Spec:
    if isinstance(value, (np.ndarray, np.generic, bool, int, float, complex)):
        array = np.asarray(value)
        return Spec(array.shape, array.dtype)
    return NOT_AN_ARRAY


_READER = "Flax: `flax.serialization.from_bytes(variables, data)`"
FORMAT = Format("msgpack", ("variables.msgpack",), _open, _write, _READER, whole=True)
