"""Parents: K variable pytrees of one structure, checked, and stacked leaf by leaf to `[K, ...]`.

Knows pytrees and nothing of networks, masks or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megajax.errors import ParentsError
from megajax.types import PyTree

__all__ = ["check_parents", "leaf_paths", "num_parents", "stack_parents", "unstack_parents"]


def leaf_paths(tree: PyTree) -> list[str]:
    """Paths of the leaves in flattening order, such as `params/Dense_0/kernel`.

    Example:
        >>> leaf_paths({"b": [1, 2], "a": 3})
        ['a', 'b/0', 'b/1']
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]


def check_parents(parents: Sequence[PyTree]) -> None:
    """Checks that the parents can be mixed leaf by leaf.

    Args:
        parents: K >= 2 variable pytrees with array leaves.

    Raises:
        ParentsError: fewer than two parents; a parent without leaves; a leaf that is missing, or
            that has another shape or dtype than in parent 0 (the first such leaf is named with both
            shapes and dtypes); a leaf with a value that is not finite.

    Example:
        >>> check_parents([{"w": np.ones((2, 3))}, {"w": np.ones((2, 4))}])
        Traceback (most recent call last):
        ...
        megajax.errors.ParentsError: leaf w: float64[2,3] in parent 0 but float64[2,4] in parent 1
    """
    if len(parents) < 2:
        raise ParentsError(f"{len(parents)} parent given: a merge needs at least two")
    reference = _leaves_by_path(parents[0])
    if not reference:
        raise ParentsError("parent 0 has no leaves: its variables are empty")
    for k, parent in enumerate(parents[1:], start=1):
        leaves = _leaves_by_path(parent)
        for path in [*reference, *leaves]:
            ours, theirs = _describe(reference.get(path)), _describe(leaves.get(path))
            if ours != theirs:
                raise ParentsError(f"leaf {path}: {ours} in parent 0 but {theirs} in parent {k}")
        found, wanted = (str(jax.tree.structure(tree)) for tree in (parent, parents[0]))
        if found != wanted:
            raise ParentsError(
                f"parent {k} has the leaves of parent 0 in other containers: "
                f"{found} instead of {wanted}"
            )
    for k, parent in enumerate(parents):
        for path, leaf in _leaves_by_path(parent).items():
            values = np.asarray(leaf)
            if jnp.issubdtype(values.dtype, jnp.inexact):
                bad = values.size - int(np.isfinite(values.astype(np.float64)).sum())
                if bad:
                    raise ParentsError(
                        f"leaf {path} of parent {k}: {bad} of {values.size} values are not finite"
                    )


def stack_parents(parents: Sequence[PyTree]) -> PyTree:
    """Checks the parents and stacks them leaf by leaf.

    Args:
        parents: K >= 2 variable pytrees of one structure, leaves of shape `[...]`.

    Returns:
        One pytree of the same structure with leaves of shape `[K, ...]` and unchanged dtypes.

    Raises:
        ParentsError: see `check_parents`.

    Example:
        >>> stack_parents([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
        (2, 3)
    """
    check_parents(parents)
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *parents)


def unstack_parents(parents: PyTree) -> list[PyTree]:
    """The inverse of `stack_parents`: K pytrees from one with leaves `[K, ...]`.

    Example:
        >>> [int(p["w"]) for p in unstack_parents({"w": jnp.arange(3)})]
        [0, 1, 2]
    """
    leaves, treedef = jax.tree.flatten(parents)
    return [jax.tree.unflatten(treedef, of_one) for of_one in zip(*leaves, strict=True)]


def num_parents(parents: PyTree) -> int:
    """The number of parents K in a stacked pytree.

    Example:
        >>> num_parents({"w": jnp.zeros((4, 3))})
        4
    """
    return int(jax.tree.leaves(parents)[0].shape[0])


def _leaves_by_path(tree: PyTree) -> dict[str, Any]:
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def _describe(leaf: Any) -> str:
    if leaf is None:
        return "no such leaf"
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
