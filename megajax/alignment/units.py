"""Which hidden unit each element of a network belongs to, as labels for mixing masks.

A hidden unit is made by the weights that write it: its incoming weights in every layer that adds to
it, bias, normalisation and statistics. The program says along which axis a kernel writes, and the
symmetries say which entries of which leaves are the same unit; names play no part.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from megajax.alignment.permutations import unit_layout
from megajax.alignment.symmetries import (
    Group,
    Site,
    Symmetries,
    find_symmetries,
    sites_by_leaf,
)
from megajax.program.roles import Role, find_roles
from megajax.trees import leaf_paths
from megajax.types import ApplyFn, PyTree

__all__ = ["unit_labels"]


def unit_labels(
    apply_fn: ApplyFn, variables: PyTree, inputs: Any, symmetries: Symmetries | None = None
) -> PyTree:
    """Labels with one gene for each hidden unit, for `megajax.merging.genome.masks`.

    The elements that write one unit of a group of the symmetries share a gene, in all leaves: in a
    residual stream, those of every layer that adds to it. Outputs, and other units in no group, get
    a gene for each layer and index.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs, or its shape and dtype.
        symmetries: of the network; None finds them.

    Returns:
        Pytree like `variables` of int32 arrays that broadcast against the leaves. Genes are
        numbered from 0, in the order in which the program uses them.

    Example:
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["u"] + w["b"]) @ w["v"]
        >>> w = {"u": np.ones((3, 2)), "b": np.ones(2), "v": np.ones((2, 3))}
        >>> labels = unit_labels(mlp, w, np.ones((1, 3)))
        >>> labels["u"].tolist(), labels["b"].tolist(), labels["v"].tolist()
        ([[0, 1]], [0, 1], [[2, 3, 4]])
    """
    if symmetries is None:
        symmetries = find_symmetries(apply_fn, variables, inputs)
    sites = sites_by_leaf(symmetries.groups)
    leaves, treedef = jax.tree.flatten(variables)
    paths = leaf_paths(variables)
    roles = find_roles(apply_fn, variables, inputs).leaves
    layers = [role.layer for role in roles]

    genes: dict[Hashable, int] = {}
    labels: list[Any] = [None] * len(leaves)
    for i in sorted(range(len(leaves)), key=lambda i: (layers[i], i)):
        shape = tuple(leaves[i].shape)
        outputs = _outputs(roles[i], shape)
        here = [(g, site) for g, site in sites.get(paths[i], []) if site.axis in outputs]
        copies = {site.copies.axis for _, site in here if site.copies is not None}
        axes = sorted({*outputs, *copies})
        numbers = [
            genes.setdefault(unit, len(genes)) for unit in _units(shape, axes, here, layers[i])
        ]
        inside = [n if axis in axes else 1 for axis, n in enumerate(shape)]
        labels[i] = np.array(numbers, np.int32).reshape(inside)
    return jax.tree.unflatten(treedef, labels)


def _outputs(role: Role, shape: Sequence[int]) -> tuple[int, ...]:
    """The axes along which a leaf writes: those that its first contraction does not sum over.

    For a leaf that is in no contraction outside loops, its last axis longer than one.
    """
    found = [one.written for one in role.contractions if not one.inside][:1]
    return (found and found[0]) or tuple(axis for axis, n in enumerate(shape) if n != 1)[-1:]


def _units(
    shape: Sequence[int], axes: Sequence[int], sites: Sequence[tuple[Group, Site]], layer: int
) -> Iterator[Hashable]:
    """What names the unit of each entry along the axes, in row-major order."""
    layouts = [(group, site, *unit_layout(group, site, shape)) for group, site in sites]
    for index in np.ndindex(*(shape[axis] for axis in axes)):
        at = dict(zip(axes, index, strict=True))
        units: dict[str, tuple[int, int]] = {}
        held, covered = set(), set()
        for group, site, copy, unit in layouts:
            u = int(unit[at[site.axis]])
            copy_axis = site.axis if site.copies is None else site.copies.axis
            c = int(copy[at[copy_axis]])
            if u >= 0 and c >= 0:
                units[group.name] = (c, u)
                held.add(group.within)  # which copy it is says it already
                covered |= {site.axis, copy_axis}
        rest = [(layer, k, i) for k, i in enumerate(index) if axes[k] not in covered]
        yield (*((name, *place) for name, place in units.items() if name not in held), *rest)
