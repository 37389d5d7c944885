"""How much of each parent there is in a merged network, module by module: what plots show.

Knows genomes and pytrees. A module is named by its leaves' path.
"""

from __future__ import annotations

import jax
import numpy as np

from megajax.merging.genome import FROZEN, Genome
from megajax.trees import leaf_paths, num_parents
from megajax.types import PyTree

__all__ = ["channel_shares", "parent_shares", "projected_shares"]


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
        >>> from megajax.merging.genome import masks
        >>> genome = masks({"conv": {"kernel": np.zeros((2, 3))}}, granularity="leaf")
        >>> parent_shares(genome, np.array([[0.25, 0.75]]), {"conv": {"kernel": np.zeros(3)}})
        {'conv': [0.25, 0.75]}
    """
    coefficients = np.asarray(genes, np.float64)
    frozen = np.eye(coefficients.shape[1])[0]
    labels = jax.tree.leaves(genome.labels)
    sums: dict[str, tuple[int, int, np.ndarray]] = {}
    leaves = jax.tree.leaves(variables)
    for name, label, leaf in zip(_modules(variables), labels, leaves, strict=True):
        of_leaf = np.where((label == FROZEN)[..., None], frozen, coefficients[label])
        mean = of_leaf.reshape(-1, coefficients.shape[1]).mean(axis=0)
        first, count, total = sums.get(name, (int(label.flat[0]), 0, np.zeros_like(frozen)))
        sums[name] = (min(first, int(label.flat[0])), count + leaf.size, total + leaf.size * mean)
    ordered = sorted(sums.items(), key=lambda item: (item[1][0], -item[1][1]))
    return {name: (total / count).tolist() for name, (_, count, total) in ordered}


def channel_shares(genome: Genome, genes: jax.Array, variables: PyTree) -> dict[str, np.ndarray]:
    """How much of each parent there is in each output channel of an individual's modules.

    Args:
        genome: a genome of masks.
        genes: `[G, K]` of one individual.
        variables: one network, for its paths and shapes.

    Returns:
        For each module, named and ordered as by `parent_shares`, the coefficients `[channels, K]`
        of its largest leaf, mean over all axes but the channels'. That is the axis along which
        genes change, or the last one.

    Example:
        >>> from megajax.merging.genome import masks
        >>> genome = masks({"w": np.zeros((2, 4, 2))}, granularity="element")
        >>> genes = np.eye(2)[np.array([0, 0, 0, 1, 0, 0, 0, 1])]
        >>> channel_shares(genome, genes, {"w": np.zeros((4, 2))})["w"].tolist()
        [[1.0, 0.0], [0.5, 0.5]]
    """
    coefficients = np.asarray(genes, np.float64)
    frozen = np.eye(coefficients.shape[1])[0]
    labels = jax.tree.leaves(genome.labels)
    leaves = jax.tree.leaves(variables)
    largest: dict[str, int] = {}
    for i, name in enumerate(_modules(variables)):
        if name not in largest or leaves[i].size > leaves[largest[name]].size:
            largest[name] = i
    found = {}
    for name in parent_shares(genome, genes, variables):
        label, leaf = labels[largest[name]], leaves[largest[name]]
        varying = [axis for axis, size in enumerate(label.shape) if size > 1]
        axis = varying[0] if len(varying) == 1 else leaf.ndim - 1
        of_leaf = np.where((label == FROZEN)[..., None], frozen, coefficients[label])
        others = tuple(i for i in range(leaf.ndim) if i != axis)
        rows = of_leaf.mean(axis=others)
        found[name] = np.broadcast_to(rows, (leaf.shape[axis] if leaf.ndim else 1, len(frozen)))
    return found


def projected_shares(variables: PyTree, parents: PyTree) -> dict[str, list[float]]:
    """How much of each parent there is in each module of any network, by its place between them.

    The shares of a module are the coefficients of the nearest point to it (least squares) on the
    line, plane, ... through the parents.

    Args:
        variables: one network.
        parents: leaves `[K, ...]`.

    Returns:
        For each module, named as by `parent_shares`, K numbers that sum to one; they may be
        negative or above one, for what lies outside the parents. Equal parents share alike.

    Example:
        >>> parents = {"conv": {"kernel": np.array([[0.0, 0.0], [4.0, 4.0]])}}
        >>> shares = projected_shares({"conv": {"kernel": np.array([1.0, 1.0])}}, parents)
        >>> np.round(shares["conv"], 6).tolist()
        [0.75, 0.25]
    """
    K = num_parents(parents)
    grams: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    leaves = jax.tree.leaves(variables), jax.tree.leaves(parents)
    for name, leaf, of_parents in zip(_modules(variables), *leaves, strict=True):
        points = np.asarray(of_parents, np.float64).reshape(K, -1)
        centre = points.mean(axis=0)
        offset = np.asarray(leaf, np.float64).ravel() - centre
        gram, moment = grams.get(name, (np.zeros((K, K)), np.zeros(K)))
        grams[name] = (
            gram + (points - centre) @ (points - centre).T,
            moment + (points - centre) @ offset,
        )
    return {
        name: (1 / K + np.linalg.pinv(gram, hermitian=True) @ moment).tolist()
        for name, (gram, moment) in grams.items()
    }


def _modules(variables: PyTree) -> list[str]:
    """The module of each leaf: its path without collection and last part."""
    paths = [path.split("/") for path in leaf_paths(variables)]
    collections = {"params", "batch_stats"} >= {path[0] for path in paths}
    return ["/".join(path[1 if collections else 0 : -1]) or path[-1] for path in paths]
