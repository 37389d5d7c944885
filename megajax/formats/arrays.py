"""Variable pytrees as named arrays, and files as named arrays: what every format has in common.

Knows shapes, dtypes and pytrees, and nothing of any one format. A leaf's name is the path that the
rest of the library calls it by, such as `params/Dense_0/kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import InterchangeError
from megajax.trees import leaf_paths
from megajax.types import PyTree

__all__ = [
    "Format",
    "Keyed",
    "Spec",
    "Stored",
    "arrays_of",
    "is_number",
    "native",
    "nested",
    "specs_of",
]

Keyed: TypeAlias = Mapping[tuple[str, ...], np.ndarray]
"""The keys that lead to each array -> the array."""


class Spec(NamedTuple):
    """Shape and dtype of an array.

    Example:
        >>> str(Spec((2, 3), np.dtype("float32")))
        'float32[2,3]'
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return self.dtype.itemsize * math.prod(self.shape)


NOT_AN_ARRAY = Spec((), np.dtype(object))
"""What a file says of text and the like."""


class Stored(NamedTuple):
    """A file of named arrays, opened and checked in itself, its arrays not yet read.

    Attributes:
        path: of the file.
        specs: what it says it holds; what is not an array has the dtype `object`.
        read: `read(names) -> {name: array}`.
    """

    path: Path
    specs: Mapping[str, Spec]
    read: Callable[[Sequence[str]], dict[str, np.ndarray]]


class Format(NamedTuple):
    """A file format; `megajax.formats.kinds` has one in each of its modules.

    Attributes:
        name: what users call it.
        files: what a network may be called in a folder, whence the suffixes of the format, of which
            it has none where it is a folder itself; a network is saved as the first.
        open: opens a file and checks it in itself.
        write: writes arrays, whole or not at all.
        reader: how others read it, for the model card.
        flat: arrays have one name each, so that the names of another library can be written.
        whole: a file is read into memory to be opened.
        find: networks in a folder, where they have no names of their own.
    """

    name: str
    files: tuple[str, ...]
    open: Callable[[Path], Stored]
    write: Callable[[Path, Keyed], None]
    reader: str
    flat: bool = False
    whole: bool = False
    find: Callable[[Path], list[Path]] | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Such as `.npz`."""
        return tuple(file[file.index(".") :] for file in self.files if "." in file)


def specs_of(variables: PyTree) -> dict[str, Spec]:
    """Path -> shape and dtype of each leaf, in flattening order; Python numbers are arrays too.

    Raises:
        InterchangeError: a leaf is not an array of numbers, or two leaves have one path.

    Example:
        >>> {path: str(spec) for path, spec in specs_of({"w": np.ones((2, 3)), "step": 4}).items()}
        {'step': 'int64[]', 'w': 'float64[2,3]'}
        >>> specs_of({"w": "text"})
        Traceback (most recent call last):
        ...
        megajax.errors.InterchangeError: leaf w is a str: an array of numbers or booleans is needed
    """
    specs: dict[str, Spec] = {}
    for path, leaf in zip(leaf_paths(variables), jax.tree.leaves(variables), strict=True):
        if path in specs:
            raise InterchangeError(f"two leaves are called {path}: a file needs unique names")
        typed = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        shape, dtype = np.shape(leaf), leaf.dtype if typed else np.asarray(leaf).dtype
        # Extended types (PRNG keys), strings and objects are no numbers.
        if not (isinstance(dtype, np.dtype) and is_number(dtype)):
            kind = dtype if typed else type(leaf).__name__
            raise InterchangeError(
                f"leaf {path} is a {kind}: an array of numbers or booleans is needed"
            )
        specs[path] = Spec(tuple(shape), dtype.newbyteorder("="))
    return specs


def is_number(dtype: np.dtype) -> bool:
    """Whether arrays of a dtype hold numbers or booleans, bfloat16 and its like included.

    Example:
        >>> is_number(np.dtype("bool")), is_number(np.dtype("U3")), is_number(np.dtype("V2"))
        (True, False, False)
    """
    return bool(jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))


def arrays_of(variables: PyTree) -> dict[tuple[str, ...], np.ndarray]:
    """The keys that lead to each leaf -> the leaf as an array, in flattening order.

    Raises:
        InterchangeError: see `specs_of`.

    Example:
        >>> arrays_of({"layers": [{"w": np.ones(2)}]})
        {('layers', '0', 'w'): array([1., 1.])}
    """
    specs_of(variables)
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(variables))
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in keys): native(np.asarray(leaf))
        for keys, leaf in flat
    }


def native(array: np.ndarray) -> np.ndarray:
    """The array in C order and the machine's byte order, of the same rank.

    Example:
        >>> native(np.array(3, ">i4")).dtype.isnative
        True
    """
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def nested(arrays: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested dictionaries; a leaf without keys (the whole tree is one array) is called `value`.

    Raises:
        InterchangeError: a leaf has the name of a container.

    Example:
        >>> nested({("params", "w"): 1, ("params", "b"): 2})
        {'params': {'w': 1, 'b': 2}}
    """
    tree: dict[str, Any] = {}
    for keys, leaf in arrays.items():
        *outer, last = keys or ("value",)
        at: Any = tree
        for key in outer:
            at = at.setdefault(key, {}) if isinstance(at, dict) else None
        if not isinstance(at, dict) or last in at:
            raise InterchangeError(f"{'/'.join(keys)} is the name of a leaf and of a container")
        at[last] = leaf
    return tree
