"""Leaf by leaf: what every method does with the leaves that it mixes, and with those it must not.

Knows pytrees only. A floating leaf is mixed in float32 or wider and cast back; any other leaf
(counters, PRNG keys) stays as in parent 0. BatchNorm statistics are floating, but no weights: sums
of task vectors can make a variance negative, and their size says nothing of how much they matter.
`on_weights` keeps them out of a method and averages them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from megajax.errors import ParentsError
from megajax.program.roles import find_statistics
from megajax.trees import leaf_paths, leaves_by_path
from megajax.types import ApplyFn, PyTree

__all__ = ["combine", "is_floating", "on_weights", "statistic_paths"]


def is_floating(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers, which can be mixed.

    Example:
        >>> is_floating(jnp.ones(2)), is_floating(jnp.arange(2))
        (True, False)
    """
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return bool(jnp.issubdtype(dtype, jnp.floating))


def combine(function: Callable[..., jax.Array], *groups: Sequence[PyTree]) -> PyTree:
    """A pytree made leaf by leaf from groups of pytrees of one structure.

    Args:
        function: `function(*stacks) -> leaf`; it gets one stack `[size of the group, ...]` for each
            group, in float32 or wider.
        *groups: sequences of pytrees; the first group are the parents.

    Returns:
        A pytree like a parent, with its dtypes; leaves that are not floating are parent 0's.

    Raises:
        ParentsError: two of the pytrees differ in structure or in the shape of a leaf.

    Example:
        >>> parents = [{"w": jnp.zeros(2), "step": 3}, {"w": jnp.ones(2), "step": 4}]
        >>> mean = combine(lambda leaves: leaves.mean(0), parents)
        >>> mean["w"].tolist(), mean["step"]
        ([0.5, 0.5], 3)
    """
    first = groups[0][0]
    for position, tree in enumerate(tree for group in groups for tree in group):
        _check_alike(first, tree, position)
    columns = [zip(*map(jax.tree.leaves, group), strict=True) for group in groups]

    def of_leaf(*stacks: Sequence[Any]) -> Any:
        leaf = stacks[0][0]
        if not is_floating(leaf):
            return leaf
        dtype = jnp.asarray(leaf).dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        arrays = [jnp.stack([jnp.asarray(x, wide) for x in stack]) for stack in stacks]
        return function(*arrays).astype(dtype)

    leaves = [of_leaf(*stacks) for stacks in zip(*columns, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(first), leaves)


def statistic_paths(
    apply_fn: ApplyFn, variables: PyTree, inputs: Any, named: Sequence[tuple[str, str]] = ()
) -> frozenset[str]:
    """The paths of a network's BatchNorm statistics, found in its program.

    Args:
        apply_fn: the network, in inference mode.
        variables: of one network, or their shapes and dtypes.
        inputs: one batch, or its shape and dtype.
        named: paths of (mean, variance) leaves that are statistics even if nothing shows it.

    Returns:
        Paths as `megajax.trees.leaf_paths` gives them; none for a network without BatchNorm.

    Example:
        >>> def apply_fn(w, x):
        ...     return (x * w["scale"] - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        >>> w = {"mean": jnp.zeros(3), "scale": jnp.ones(3), "var": jnp.ones(3)}
        >>> sorted(statistic_paths(apply_fn, w, jnp.ones((8, 3))))
        ['mean', 'var']
    """
    paths = leaf_paths(variables)
    statistics = find_statistics(apply_fn, variables, inputs, named)
    return frozenset(paths[index] for s in statistics for index in (s.mean, s.variance))


def on_weights(
    method: Callable[..., PyTree],
    statistics: Collection[str],
    parents: Sequence[PyTree],
    *others: PyTree,
) -> PyTree:
    """Applies a method to everything but the BatchNorm statistics, which are averaged.

    Args:
        method: `method(parents, *others) -> variables`.
        statistics: paths of the leaves to average, such as from `statistic_paths`.
        parents: K variable pytrees.
        *others: what else the method takes: pytrees of the parents' structure (a base network), or
            lists of them (Fisher information).

    Returns:
        The method's result, statistics filled in.

    Example:
        >>> parents = [{"w": jnp.ones(1), "var": var} for var in (jnp.zeros(1), jnp.ones(1))]
        >>> total = lambda parents: combine(lambda leaves: leaves.sum(0), parents)
        >>> merged = on_weights(total, {"var"}, parents)
        >>> merged["w"].tolist(), merged["var"].tolist()
        ([2.0], [0.5])
    """
    if not statistics:
        return method(parents, *others)
    drop = partial(_without, statistics)
    merged = method(
        [drop(parent) for parent in parents],
        *(list(map(drop, other)) if isinstance(other, list) else drop(other) for other in others),
    )
    average = combine(lambda leaves: leaves.mean(axis=0), parents)
    leaves = leaves_by_path(average) | leaves_by_path(merged)
    return jax.tree.unflatten(jax.tree.structure(average), list(leaves.values()))


def _without(paths: Collection[str], tree: PyTree) -> PyTree:
    """The tree with None, which is no leaf, at these paths."""
    leaves, treedef = jax.tree.flatten(tree)
    kept = zip(leaf_paths(tree), leaves, strict=True)
    return jax.tree.unflatten(treedef, [None if path in paths else leaf for path, leaf in kept])


def _check_alike(first: PyTree, other: PyTree, position: int) -> None:
    """Raises for the first leaf in which two networks differ; works on traced arrays as well."""
    paths, others = leaf_paths(first), leaf_paths(other)
    if paths != others:
        missing = next((p for p in [*paths, *others] if (p in paths) != (p in others)), paths[0])
        raise ParentsError(f"leaf {missing} is not in all networks: network {position} differs")
    pairs = zip(paths, jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    for path, ours, theirs in pairs:
        if jnp.shape(ours) != jnp.shape(theirs):
            raise ParentsError(
                f"leaf {path} has shape {jnp.shape(ours)} in network 0 but {jnp.shape(theirs)} in "
                f"network {position}"
            )
