"""Variable pytrees as named NumPy arrays, for every file format alike.

Knows pytrees and nothing of files. A leaf's name is the path that the rest of the library calls it
by, such as `params/Dense_0/kernel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import InterchangeError
from megajax.formats.files import Spec
from megajax.trees import leaf_paths
from megajax.types import PyTree

__all__ = ["arrays_of", "is_number", "keys_of", "native", "nested", "specs_of"]


def keys_of(variables: PyTree) -> list[tuple[str, ...]]:
    """The keys that lead to each leaf, in flattening order.

    Args:
        variables: pytree.

    Returns:
        A tuple of strings for each leaf.

    Example:
        >>> keys_of({"a": [1, 2], "b/c": 3})
        [('a', '0'), ('a', '1'), ('b/c',)]
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(variables)
    return [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in flat]


def specs_of(variables: PyTree) -> dict[str, Spec]:
    """Shape and dtype of each leaf.

    Args:
        variables: pytree of arrays, Python numbers, or shapes and dtypes.

    Returns:
        Path -> shape and dtype, in flattening order.

    Raises:
        InterchangeError: a leaf is no array of numbers, or two leaves have one path.

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
        described = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else np.asarray(leaf)
        # Extended types (PRNG keys), strings and objects are no numbers.
        if not (isinstance(described.dtype, np.dtype) and is_number(described.dtype)):
            kind = described.dtype if described is leaf else type(leaf).__name__
            raise InterchangeError(
                f"leaf {path} is a {kind}: an array of numbers or booleans is needed"
            )
        specs[path] = Spec(tuple(described.shape), np.dtype(described.dtype).newbyteorder("="))
    return specs


def is_number(dtype: np.dtype) -> bool:
    """Whether arrays of a dtype hold numbers or booleans, bfloat16 and its like included.

    Example:
        >>> is_number(np.dtype("bool")), is_number(np.dtype("U3")), is_number(np.dtype("V2"))
        (True, False, False)
    """
    return bool(jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))


def arrays_of(variables: PyTree) -> dict[str, np.ndarray]:
    """The leaves as NumPy arrays.

    Args:
        variables: pytree of arrays or Python numbers.

    Returns:
        Path -> array, in flattening order, native byte order.

    Raises:
        InterchangeError: see `specs_of`.

    Example:
        >>> arrays_of({"layers": [{"w": np.ones(2)}]})
        {'layers/0/w': array([1., 1.])}
    """
    specs = specs_of(variables)
    leaves = jax.device_get(jax.tree.leaves(variables))
    return {path: native(np.asarray(leaf)) for path, leaf in zip(specs, leaves, strict=True)}


def native(array: np.ndarray) -> np.ndarray:
    """The array in C order and the machine's byte order, of the same rank.

    Example:
        >>> native(np.array(3, ">i4")).dtype.isnative
        True
    """
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def nested(arrays: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested dictionaries from keys.

    Args:
        arrays: keys that lead to a leaf -> the leaf.

    Returns:
        Dictionaries of dictionaries; a leaf without keys (the whole tree is one array) is called
        `value`.

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
