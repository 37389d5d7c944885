"""Arithmetic on task vectors, the differences between fine-tuned parents and their common base.

Knows pytrees only. A task vector is a pytree like the network, float32 or wider; leaves that are
not floating are 0 in it, and so the base's in the result. BatchNorm statistics must stay out
(`megajax.baselines.on_weights`): a sum of differences can make a variance negative, and their size
distorts what TIES trims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from megajax.baselines.given import Given, Result, baseline, best_of
from megajax.baselines.leaves import combine, is_floating
from megajax.errors import ConfigError
from megajax.types import Key, PyTree

__all__ = [
    "add_up",
    "apply_task_vector",
    "dare",
    "drop",
    "elect",
    "task_arithmetic",
    "task_vectors",
    "ties",
    "trim",
]


def task_vectors(parents: Sequence[PyTree], base: PyTree) -> list[PyTree]:
    """What each parent added to the base.

    Args:
        parents: K variable pytrees of one structure.
        base: the network that all of them were trained from, alike.

    Returns:
        K task vectors.

    Raises:
        ParentsError: a parent and the base differ in structure or shapes.

    Example:
        >>> task_vectors([{"w": jnp.array([3.0])}], {"w": jnp.array([1.0])})[0]["w"].tolist()
        [2.0]
    """
    wide = _widened(base)
    return [
        combine(lambda old, new: new[0] - old[0], [wide], [_widened(parent)]) for parent in parents
    ]


def apply_task_vector(base: PyTree, vector: PyTree, scale: float = 1.0) -> PyTree:
    """The base plus a scaled task vector, in the base's dtypes.

    Example:
        >>> apply_task_vector({"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}, 0.5)["w"].tolist()
        [2.0]
    """
    return combine(lambda old, new: old[0] + scale * new[0], [base], [vector])


def task_arithmetic(parents: Sequence[PyTree], base: PyTree, *, scale: float = 0.4) -> PyTree:
    """`base + scale * sum of the task vectors`.

    Args:
        parents: K variable pytrees of one structure.
        base: the network that all of them were trained from.
        scale: 0.4 is what the paper's successors take without validation data; `1 / K` gives the
            mean of the parents. Best chosen on validation data.

    Returns:
        The merged network.

    Raises:
        ParentsError: a parent and the base differ in structure or shapes.

    Example:
        >>> parents = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
        >>> task_arithmetic(parents, {"w": jnp.zeros(2)}, scale=0.5)["w"].tolist()
        [0.5, 1.0]

    Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023, arXiv 2212.04089.
    """
    return apply_task_vector(base, add_up(task_vectors(parents, base)), scale)


def ties(
    parents: Sequence[PyTree], base: PyTree, *, density: float = 0.2, scale: float = 1.0
) -> PyTree:
    """Trim, elect signs, merge: `base + scale * elect(trim(task vectors))`.

    Args:
        parents: K variable pytrees of one structure.
        base: the network that all of them were trained from.
        density: share of each task vector that is kept; 0 gives back the base.
        scale: of the merged task vector; 1 is the paper's recipe without validation data.

    Returns:
        The merged network.

    Raises:
        ParentsError: a parent and the base differ in structure or shapes.
        ConfigError: the density lies outside [0, 1].

    Example:
        >>> parents = [{"w": jnp.array([3.0, 0.5])}, {"w": jnp.array([-1.0, 2.5])}]
        >>> ties(parents, {"w": jnp.zeros(2)}, density=1.0)["w"].tolist()
        [3.0, 1.5]

    Source: Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv 2306.01708.
    """
    vectors = [trim(vector, density) for vector in task_vectors(parents, base)]
    return apply_task_vector(base, elect(vectors), scale)


def dare(
    key: Key,
    parents: Sequence[PyTree],
    base: PyTree,
    *,
    density: float = 0.5,
    scale: float = 0.4,
) -> PyTree:
    """Drops a random part of each task vector, rescales the rest, and adds up.

    Args:
        key: PRNG key; every leaf of every parent draws by itself.
        parents: K variable pytrees of one structure.
        base: the network that all of them were trained from.
        density: probability that an element is kept, one minus the paper's drop rate; 0 gives back
            the base, 1 keeps everything.
        scale: of the merged task vector.

    Returns:
        The merged network.

    Raises:
        ParentsError: a parent and the base differ in structure or shapes.
        ConfigError: the density lies outside [0, 1].

    Example:
        >>> parents = [{"w": jnp.ones(1000)}, {"w": jnp.ones(1000)}]
        >>> merged = dare(jax.random.key(0), parents, {"w": jnp.zeros(1000)}, scale=0.5)
        >>> sorted(set(merged["w"].tolist()))  # kept by none, by one and by both
        [0.0, 1.0, 2.0]

    Source: Yu et al., "Language models are super Mario", ICML 2024, arXiv 2311.03099.
    """
    keys = jax.random.split(key, len(parents))
    vectors = task_vectors(parents, base)
    sparse = [drop(k, vector, density) for k, vector in zip(keys, vectors, strict=True)]
    return apply_task_vector(base, add_up(sparse), scale)


def add_up(vectors: Sequence[PyTree]) -> PyTree:
    """The sum of task vectors.

    Example:
        >>> add_up([{"w": jnp.ones(1)}, {"w": jnp.ones(1)}])["w"].tolist()
        [2.0]
    """
    return combine(lambda leaves: leaves.sum(axis=0), vectors)


def trim(vector: PyTree, density: float) -> PyTree:
    """Keeps the elements of largest magnitude and sets the others to 0.

    Over the whole vector, as in the paper, not leaf by leaf: a leaf of a single element is no
    special case. `round(density * size)` elements are kept, and all that are as large as the
    smallest of them.

    Args:
        vector: a task vector.
        density: share to keep, in [0, 1].

    Returns:
        The trimmed task vector.

    Raises:
        ConfigError: the density lies outside [0, 1].

    Example:
        >>> trim({"a": jnp.array([1.0, -4.0]), "b": jnp.array([3.0, 2.0])}, 0.5)["a"].tolist()
        [0.0, -4.0]
    """
    _check(density)
    sizes = [jnp.abs(leaf).reshape(-1) for leaf in jax.tree.leaves(vector)]
    magnitudes = jnp.concatenate(sizes) if sizes else jnp.zeros(0)
    kept = round(density * magnitudes.size)
    if kept == 0:
        return jax.tree.map(jnp.zeros_like, vector)
    threshold = jnp.sort(magnitudes)[magnitudes.size - kept]
    return jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) >= threshold, leaf, 0), vector)


def elect(vectors: Sequence[PyTree]) -> PyTree:
    """One task vector: for every element, the mean over those that have the elected sign.

    The sign of the sum is elected, so that the larger total magnitude wins. Where the sum is
    exactly zero the elected sign is zero too, and so is the result, as in the paper's equations
    (the authors' code gives such an element the sign that most elements of the vector have).

    Args:
        vectors: K task vectors, trimmed or not.

    Returns:
        The merged task vector. Elements that are 0 in a vector do not count for its mean.

    Example:
        >>> vectors = [{"w": jnp.array([3.0, 0.0, 1.0])}, {"w": jnp.array([-1.0, 2.0, -1.0])}]
        >>> elect(vectors)["w"].tolist()
        [3.0, 2.0, 0.0]

    Source: Yadav et al., arXiv 2306.01708, algorithm 1.
    """

    def merge(leaves: jax.Array) -> jax.Array:
        sign = jnp.sign(leaves.sum(axis=0, keepdims=True))
        agrees = (jnp.sign(leaves) == sign) & (sign != 0)
        return jnp.sum(leaves, axis=0, where=agrees) / jnp.maximum(
            agrees.sum(axis=0, dtype=leaves.dtype), 1
        )

    return combine(merge, vectors)


def drop(key: Key, vector: PyTree, density: float) -> PyTree:
    """Keeps each element with probability `density` and divides it by that, so the mean stays.

    Args:
        key: PRNG key.
        vector: a task vector.
        density: in [0, 1]; 0 gives zeros, 1 the vector itself.

    Returns:
        The sparse task vector.

    Raises:
        ConfigError: the density lies outside [0, 1].

    Example:
        >>> sorted(set(drop(jax.random.key(0), {"w": jnp.ones(99)}, 0.25)["w"].tolist()))
        [0.0, 4.0]
    """
    _check(density)
    if density == 0:
        return jax.tree.map(jnp.zeros_like, vector)
    leaves, treedef = jax.tree.flatten(vector)
    keys = jax.random.split(key, max(len(leaves), 1))
    return jax.tree.unflatten(
        treedef,
        [
            jnp.where(jax.random.bernoulli(k, density, jnp.shape(leaf)), leaf / density, 0)
            for k, leaf in zip(keys, leaves, strict=False)
        ],
    )


def _widened(tree: PyTree) -> PyTree:
    """Floating leaves in float32 or wider, zeros for the others."""

    def widen(leaf: PyTree) -> jax.Array:
        if not is_floating(leaf):
            return jnp.zeros(jnp.shape(leaf), jnp.float32)
        array = jnp.asarray(leaf)
        return array.astype(jnp.promote_types(array.dtype, jnp.float32))

    return jax.tree.map(widen, tree)


def _check(density: float) -> None:
    if not 0 <= density <= 1:
        raise ConfigError(f"density is {density}: it must lie between 0 and 1")


SCALES = tuple(i / 10 for i in range(1, 11))
"""The scales of a task vector that validation chooses from."""


def _arithmetic_at(parents: Sequence[PyTree], base: PyTree, scale: float) -> PyTree:
    return task_arithmetic(parents, base, scale=scale)


def _ties_at(parents: Sequence[PyTree], base: PyTree, scale: float) -> PyTree:
    return ties(parents, base, scale=scale)


def _dare_at(parents: Sequence[PyTree], base: PyTree, scale: float, key: Key) -> PyTree:
    return dare(key, parents, base, scale=scale)


def _scaled(given: Given, method: Callable[..., PyTree], *others: PyTree) -> Result:
    """A method `(parents, base, scale, *others)`, its scale chosen on the validation data."""
    networks = (given.merged(method, given.base, np.float32(s), *others) for s in SCALES)
    variables, number, scores = best_of(networks, given.score)
    detail = {"scale": SCALES[number], "fitness": scores[number]}
    return Result(variables, len(scores), detail=detail)


@baseline(
    "task_arithmetic",
    "the base plus the scaled sum of the task vectors",
    "Ilharco et al., arXiv 2212.04089",
    needs=("base",),
)
def _task_arithmetic(key: Key, given: Given) -> Result:
    return _scaled(given, _arithmetic_at)


@baseline(
    "ties",
    "task vectors trimmed to a fifth, merged where signs agree",
    "Yadav et al., arXiv 2306.01708",
    needs=("base",),
)
def _ties(key: Key, given: Given) -> Result:
    return _scaled(given, _ties_at)


@baseline(
    "dare",
    "task vectors with a random half dropped and the rest doubled, added up",
    "Yu et al., arXiv 2311.03099",
    needs=("base",),
)
def _dare(key: Key, given: Given) -> Result:
    return _scaled(given, _dare_at, key)
