"""How much of each parent there is in a merged network, module by module: what plots show.

Knows masks and pytrees. A module is named by its leaves' path.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from megajax.merging.masks import FROZEN, Masks
from megajax.trees import is_mixable, leaf_paths
from megajax.types import PyTree

__all__ = ["channel_shares", "projected_shares"]


def channel_shares(genome: Masks, genes: jax.Array, variables: PyTree) -> dict[str, np.ndarray]:
    """How much of each parent there is in each output channel of an individual's modules.

    Args:
        genome: masks.
        genes: `[G, K]` of one individual.
        variables: one network, for its paths and shapes.

    Returns:
        For each module (a leaf's path without its collection and its last part), in the order of
        the genes, the coefficients `[channels, K]` of its largest leaf: mean over all axes but the
        one along which genes change, or the last one.

    Example:
        >>> from megajax.merging.masks import masks
        >>> network = {"w": np.zeros((4, 2), np.float32)}
        >>> genome = masks(network, 2, granularity="element")
        >>> genes = np.eye(2)[np.array([0, 0, 0, 1, 0, 0, 0, 1])]
        >>> channel_shares(genome, genes, network)["w"].tolist()
        [[1.0, 0.0], [0.5, 0.5]]
    """
    coefficients = np.asarray(genes, np.float64)
    frozen = np.eye(coefficients.shape[1])[0]
    largest: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    labels, leaves = jax.tree.leaves(genome.labels.tree), jax.tree.leaves(variables)
    for name, label, leaf in zip(_modules(variables), labels, leaves, strict=True):
        if name not in largest or leaf.size > largest[name][1].size:
            largest[name] = label, leaf
    found = {}
    for name, (label, leaf) in sorted(largest.items(), key=lambda item: int(item[1][0].flat[0])):
        varying = [axis for axis, size in enumerate(label.shape) if size > 1]
        axis = varying[0] if len(varying) == 1 else leaf.ndim - 1
        of_leaf = np.where((label == FROZEN)[..., None], frozen, coefficients[label])
        rows = of_leaf.mean(axis=tuple(i for i in range(leaf.ndim) if i != axis))
        found[name] = np.broadcast_to(rows, (leaf.shape[axis] if leaf.ndim else 1, len(frozen)))
    return found


def projected_shares(variables: PyTree, parents: Sequence[PyTree]) -> dict[str, list[float]]:
    """How much of each parent there is in each module of any network, by its place between them.

    The shares of a module are the coefficients of the nearest point to it (least squares) on the
    line, plane, ... through the parents.

    Args:
        variables: one network.
        parents: K pytrees alike.

    Returns:
        For each module, named as by `channel_shares`, K numbers that sum to one; they may be
        negative or above one, for what lies outside the parents. Equal parents share alike.

    Example:
        >>> zero, four = ({"conv": {"kernel": np.full(2, value)}} for value in (0.0, 4.0))
        >>> shares = projected_shares({"conv": {"kernel": np.array([1.0, 1.0])}}, [zero, four])
        >>> np.round(shares["conv"], 6).tolist()
        [0.75, 0.25]
    """
    K = len(parents)
    grams: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    rows = zip(jax.tree.leaves(variables), *map(jax.tree.leaves, parents), strict=True)
    for name, (leaf, *of_parents) in zip(_modules(variables), rows, strict=True):
        if not is_mixable(leaf):
            continue
        points = np.stack([np.asarray(one, np.float64).ravel() for one in of_parents])
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
