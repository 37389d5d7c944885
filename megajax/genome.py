"""Genomes: what a gene is, and how the genes of one individual become a network.

A genome is data plus three pure functions, `init`, `express` and `repair`. With mixing masks the
population is ONE array of coefficients over the parents, `[P, G, K]`; which leaf elements a gene
governs is a labels pytree, and every granularity is just another way to write those labels.

Example:
    >>> parents = {"w": jnp.stack([jnp.zeros((2, 3)), jnp.ones((2, 3))])}
    >>> genome = masks(parents, granularity="channel")
    >>> genes = genome.init(jax.random.key(0), 5)  # both parents, their mean, two random masks
    >>> genes.shape
    (5, 3, 2)
    >>> genome.express(genes[2], parents)["w"].tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax.projections import projection_simplex

from megajax.config import GRANULARITIES
from megajax.errors import ConfigError
from megajax.parents import leaf_paths, num_parents
from megajax.types import Genes, Key, PyTree

__all__ = ["FROZEN", "Genome", "mask_labels", "masks", "parent_shares"]

FROZEN = -1
"""The label of leaf elements that no gene governs: they stay as in parent 0."""


class Genome(NamedTuple):
    """How genes stand for networks.

    Attributes:
        init: `init(key, population_size) -> genes [P, ...]`, the first population. The parents come
            first, in order.
        express: `express(genes_of_one, parents) -> variables`, the network of one individual;
            `parents` has leaves `[K, ...]`.
        repair: `repair(genes) -> genes` puts what variation made back into the search space.
        sample: `sample(key, shape, dtype) -> genes` draws random genes, for the reset mutation.
        gene_ndim: trailing axes of one gene, for the operators.
        num_genes: genes of an individual.
        labels: pytree like the variables, the gene of each leaf element; see `masks`.
    """

    init: Callable[[Key, int], Genes]
    express: Callable[[Genes, PyTree], PyTree]
    repair: Callable[[Genes], Genes]
    sample: Callable[[Key, tuple[int, ...], Any], jax.Array]
    gene_ndim: int | None
    num_genes: int
    labels: PyTree


def masks(
    parents: PyTree,
    *,
    granularity: str = "channel",
    layers: PyTree | None = None,
    labels: PyTree | None = None,
    freeze: str | Sequence[str] | None = None,
    binary: bool = False,
) -> Genome:
    """Mixing masks over K parents: one array of coefficients, `[P, G, K]` float32.

    The coefficients of a gene are non-negative and sum to one over the parents. A leaf element is
    the mix of the parents' elements with its gene's coefficients, computed in float32 or wider; a
    one-hot gene gives back a parent's elements bit for bit. Variances stay non-negative, being
    averages. Leaves that are not floating point stay as in parent 0.

    Args:
        parents: stacked variables, leaves `[K, ...]`, or their shapes and dtypes.
        granularity: see `mask_labels`; not used with `labels`.
        layers: pytree like one parent with the number of each leaf's layer, from `find_layers`;
            needed for `layer` and `channel`. Without it each leaf counts as a layer of its own.
        labels: the gene of each leaf element, instead of a granularity: a pytree like one parent,
            or a prefix of it, of integers or integer arrays that broadcast against the leaf. Genes
            are numbered from 0, `FROZEN` (-1) keeps parent 0.
        freeze: regular expression, or several; leaves whose path one of them matches (anywhere)
            stay as in parent 0.
        binary: each gene picks one parent.

    Returns:
        The genome. Its first population holds the K parents, then their mean (not if `binary`),
        then masks around one parent each, from close to it to entirely random.

    Raises:
        ConfigError: unknown granularity; labels that do not fit or skip a number; `freeze` that
            matches no leaf, or all of them.

    Example:
        >>> parents = {"w": jnp.zeros((3, 4)), "b": jnp.zeros((3, 1))}  # K = 3
        >>> masks(parents, labels={"w": jnp.array([0, 0, 1, 1]), "b": -1}).num_genes
        2
    """
    K = num_parents(parents)
    one = jax.eval_shape(lambda parents: jax.tree.map(lambda leaf: leaf[0], parents), parents)
    if labels is None:
        labels = mask_labels(one, granularity, layers)
    labels = _frozen_and_renumbered(_broadcastable(labels, one), one, freeze)
    num_genes = 1 + max(int(leaf.max(initial=FROZEN)) for leaf in jax.tree.leaves(labels))

    def express(genes: jax.Array, parents: PyTree) -> PyTree:
        return jax.tree.map(lambda label, leaf: _mix(genes, label, leaf), labels, parents)

    def repair(genes: jax.Array) -> jax.Array:
        if binary:
            return _one_hot(jnp.argmax(genes, axis=-1), K)
        nearest = jax.vmap(projection_simplex)(genes.reshape(-1, K)).reshape(genes.shape)
        corner = _one_hot(jnp.argmax(nearest, axis=-1), K)
        nearest = jnp.where(nearest.max(-1, keepdims=True) > 1 - 1e-6, corner, nearest)
        inside = (genes >= 0).all(-1, keepdims=True)
        inside &= jnp.abs(genes.sum(-1, keepdims=True) - 1) < 1e-6
        return jnp.where(inside, genes, nearest)

    def sample(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if binary:
            return _one_hot(jax.random.randint(key, shape[:-1], 0, K), K).astype(dtype)
        return jax.random.dirichlet(key, jnp.ones(K), shape[:-1]).astype(dtype)

    def init(key: Key, population_size: int) -> jax.Array:
        founders = jnp.eye(K) if binary else jnp.concatenate([jnp.eye(K), jnp.full((1, K), 1 / K)])
        if population_size < len(founders):
            raise ConfigError(
                f"evolution.population_size is {population_size}: the first population holds the "
                f"{K} parents{'' if binary else ' and their mean'}, so at least {len(founders)} "
                "are needed"
            )
        founders = jnp.broadcast_to(founders[:, None], (len(founders), num_genes, K))
        shape = (population_size - len(founders), num_genes, K)
        home_key, distance_key, sample_key, hit_key = jax.random.split(key, 4)
        home = _one_hot(jax.random.randint(home_key, (shape[0], 1), 0, K), K)
        distance = jax.random.uniform(distance_key, (shape[0], 1, 1))
        wild = sample(sample_key, shape, jnp.float32)
        if binary:
            hit = jax.random.bernoulli(hit_key, jnp.broadcast_to(distance, (*shape[:2], 1)))
            others = jnp.where(hit, wild, home)
        else:
            others = (1 - distance) * home + distance * wild
        return jnp.concatenate([founders, others])

    return Genome(init, express, repair, sample, 1, num_genes, labels)


def mask_labels(variables: PyTree, granularity: str, layers: PyTree | None = None) -> PyTree:
    """The labels of a granularity: which gene governs each leaf element.

    Args:
        variables: one parent, or its shapes and dtypes.
        granularity: `global` (one gene for the network), `layer` (one for all leaves of a layer),
            `leaf`, `channel` (one for each output channel of a layer, shared by all its leaves:
            the last axis, as in Flax) or `element`.
        layers: pytree like `variables` with the number of each leaf's layer; None makes each leaf a
            layer of its own.

    Returns:
        Pytree like `variables` of int32 arrays that broadcast against the leaves; genes are
        numbered from 0 without gaps, layer by layer.

    Raises:
        ConfigError: unknown granularity, or `layers` of another structure.

    Example:
        >>> layer = {"kernel": np.ones((3, 2)), "bias": np.ones(2)}
        >>> mask_labels(layer, "channel", {"kernel": 0, "bias": 0})["kernel"].tolist()
        [[0, 1]]
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(
            f"genome.granularity is {granularity!r}: choose one of {', '.join(GRANULARITIES)}"
        )
    leaves, treedef = jax.tree.flatten(variables)
    if layers is None:
        layers = jax.tree.unflatten(treedef, range(len(leaves)))
    if str(jax.tree.structure(layers)) != str(treedef):
        raise ConfigError("layers has not the structure of the variables")

    next_gene = 0
    first_gene: dict[Any, int] = {}
    labels: list[np.ndarray] = [np.array(FROZEN, np.int32)] * len(leaves)
    of_layer = jax.tree.leaves(layers)
    for i in sorted(range(len(leaves)), key=lambda i: (of_layer[i], i)):
        shape, layer = tuple(leaves[i].shape), of_layer[i]
        if granularity == "global":
            group: Any = ()
            inside: tuple[int, ...] = ()
        elif granularity == "layer":
            group, inside = layer, ()
        elif granularity == "channel":
            inside = (1,) * (len(shape) - 1) + shape[-1:]
            group = (layer, shape[-1:])
        else:
            group, inside = (layer, i), shape if granularity == "element" else ()
        size = int(np.prod(inside))
        if group not in first_gene:
            first_gene[group] = next_gene
            next_gene += size
        labels[i] = (first_gene[group] + np.arange(size, dtype=np.int32)).reshape(inside)
    return jax.tree.unflatten(treedef, labels)


def _broadcastable(labels: PyTree, variables: PyTree) -> PyTree:
    """Labels as a full pytree of int32 arrays of the leaves' rank, checked leaf by leaf."""
    try:
        full = jax.tree.broadcast(labels, variables)
    except ValueError as error:
        raise ConfigError(f"labels is no prefix of the variables: {error}") from None
    paths, leaves = leaf_paths(variables), jax.tree.leaves(variables)
    result = []
    for path, label, leaf in zip(paths, jax.tree.leaves(full), leaves, strict=True):
        array = np.asarray(label)
        if not np.issubdtype(array.dtype, np.integer):
            raise ConfigError(f"labels of leaf {path} are {array.dtype}: integers are needed")
        try:
            fits = np.broadcast_shapes(array.shape, leaf.shape) == tuple(leaf.shape)
        except ValueError:
            fits = False
        if not fits:
            raise ConfigError(
                f"labels of leaf {path} have shape {array.shape}, which does not broadcast to "
                f"{tuple(leaf.shape)}"
            )
        if array.min(initial=FROZEN) < FROZEN:
            raise ConfigError(f"labels of leaf {path} go down to {array.min()}: -1 is the lowest")
        rank = (1,) * (len(leaf.shape) - array.ndim)
        result.append(array.astype(np.int32).reshape(rank + array.shape))
    return jax.tree.unflatten(jax.tree.structure(variables), result)


def _frozen_and_renumbered(
    labels: PyTree, variables: PyTree, freeze: str | Sequence[str] | None
) -> PyTree:
    """Freezes leaves by path and dtype, and closes the gaps that this leaves in the numbering."""
    paths = leaf_paths(variables)
    leaves, treedef = jax.tree.flatten(labels)
    used = set().union(*(np.unique(leaf).tolist() for leaf in leaves)) - {FROZEN}
    if used != set(range(len(used))):
        gap = next(i for i in range(len(used)) if i not in used)
        raise ConfigError(f"labels skip gene {gap}: genes are numbered from 0 without gaps")
    hit = [False] * len(paths)
    for pattern in [freeze] if isinstance(freeze, str) else freeze or ():
        try:
            matches = [bool(re.search(pattern, path)) for path in paths]
        except re.error as error:
            raise ConfigError(f"genome.freeze is {pattern!r}: {error}") from None
        if not any(matches):
            raise ConfigError(
                f"genome.freeze is {pattern!r}: it matches no leaf, such as {paths[0]}"
            )
        hit = [before or now for before, now in zip(hit, matches, strict=True)]
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(variables)]
    leaves = [
        leaf if jnp.issubdtype(dtype, jnp.floating) and not frozen else np.full_like(leaf, FROZEN)
        for leaf, dtype, frozen in zip(leaves, dtypes, hit, strict=True)
    ]
    kept = sorted(set().union(*(np.unique(leaf).tolist() for leaf in leaves)) - {FROZEN})
    if not kept:
        raise ConfigError(f"genome.freeze is {freeze!r}: no leaf is left to be mixed")
    number = np.full(len(used) + 1, FROZEN, np.int32)  # the last entry serves label -1
    number[kept] = np.arange(len(kept))
    return jax.tree.unflatten(treedef, [number[leaf] for leaf in leaves])


def _mix(genes: jax.Array, label: np.ndarray, leaf: jax.Array) -> jax.Array:
    """One leaf of one individual: `leaf [K, ...]` mixed with `genes [G, K]` as the label says."""
    if (label == FROZEN).all():
        return leaf[0]
    coefficients = jnp.moveaxis(_look_up(genes, label), -1, 0)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    mixed = jnp.sum(coefficients.astype(wide) * leaf.astype(wide), axis=0).astype(leaf.dtype)
    # Products with 0 and 1 already give a parent's numbers; this gives its bits (-0.0 too).
    picks = [coefficient == 1 for coefficient in coefficients]
    if (label == FROZEN).any():
        picks[0] = picks[0] | (label == FROZEN)
    return jnp.select(picks, list(leaf), mixed)


def _look_up(genes: jax.Array, label: np.ndarray) -> jax.Array:
    """`genes[label]`, as a slice where the labels run through, so that no index array is stored."""
    first, size = int(label.flat[0]), label.size
    if first >= 0 and np.array_equal(label.ravel(), np.arange(first, first + size)):
        return genes[first : first + size].reshape(*label.shape, genes.shape[-1])
    return genes[jnp.maximum(label, 0)]


def _one_hot(index: jax.Array, num: int) -> jax.Array:
    return jax.nn.one_hot(index, num, dtype=jnp.float32)


def parent_shares(genome: Genome, genes: jax.Array, variables: PyTree) -> dict[str, list[float]]:
    """How much of each parent there is in each module of an individual's network.

    Args:
        genome: a genome of masks.
        genes: `[G, K]` of one individual.
        variables: one network, for its paths and shapes.

    Returns:
        For each module (a leaf's path without its first part, if there are collections, and its
        last), the mean coefficients over its elements: K numbers that sum to one. In the order of
        the genes, larger modules first where they share genes.

    Example:
        >>> genome = masks({"conv": {"kernel": jnp.zeros((2, 3))}}, granularity="leaf")
        >>> parent_shares(genome, jnp.array([[0.25, 0.75]]), {"conv": {"kernel": jnp.zeros(3)}})
        {'conv': [0.25, 0.75]}
    """
    coefficients = np.asarray(genes, np.float64)
    frozen = np.eye(coefficients.shape[1])[0]
    labels = jax.tree.leaves(genome.labels)
    paths = [path.split("/") for path in leaf_paths(variables)]
    collections = {"params", "batch_stats"} >= {path[0] for path in paths}
    sums: dict[str, tuple[int, int, np.ndarray]] = {}
    for path, label, leaf in zip(paths, labels, jax.tree.leaves(variables), strict=True):
        name = "/".join(path[1 if collections else 0 : -1]) or path[-1]
        of_leaf = np.where((label == FROZEN)[..., None], frozen, coefficients[label])
        mean = of_leaf.reshape(-1, coefficients.shape[1]).mean(axis=0)
        first, count, total = sums.get(name, (int(label.flat[0]), 0, np.zeros_like(frozen)))
        sums[name] = (min(first, int(label.flat[0])), count + leaf.size, total + leaf.size * mean)
    ordered = sorted(sums.items(), key=lambda item: (item[1][0], -item[1][1]))
    return {name: (total / count).tolist() for name, (_, count, total) in ordered}
