"""Which hidden unit each element of a network belongs to, as labels for mixing masks.

A hidden unit is made by the weights that write it: its incoming weights in every layer that adds to
it, bias, normalisation and statistics. The program says along which axis a kernel writes, and the
symmetries say which entries of which leaves are the same unit; names play no part.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.extend import core

from megajax.alignment.propagation import ELEMENTWISE
from megajax.alignment.symmetries import Group, Site, Symmetries, find_symmetries, unit_layout
from megajax.program.jaxprs import moved_axes, shape_of, trace, walk
from megajax.program.roles import find_layers
from megajax.trees import leaf_paths
from megajax.types import ApplyFn, PyTree

__all__ = ["find_outputs", "unit_labels"]


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
    sites: dict[str, list[tuple[Group, Site]]] = {}
    for group in symmetries.groups:
        for site in group.sites:
            sites.setdefault(site.path, []).append((group, site))
    leaves, treedef = jax.tree.flatten(variables)
    paths = leaf_paths(variables)
    layers = jax.tree.leaves(find_layers(apply_fn, variables, inputs))
    outputs = find_outputs(apply_fn, variables, inputs)

    genes: dict[Hashable, int] = {}
    labels: list[Any] = [None] * len(leaves)
    for i in sorted(range(len(leaves)), key=lambda i: (layers[i], i)):
        shape = tuple(leaves[i].shape)
        here = [(g, site) for g, site in sites.get(paths[i], []) if site.axis in outputs[i]]
        copies = {site.copies.axis for _, site in here if site.copies is not None}
        axes = sorted({*outputs[i], *copies})
        numbers = [
            genes.setdefault(unit, len(genes)) for unit in _units(shape, axes, here, layers[i])
        ]
        inside = [n if axis in axes else 1 for axis, n in enumerate(shape)]
        labels[i] = np.array(numbers, np.int32).reshape(inside)
    return jax.tree.unflatten(treedef, labels)


def find_outputs(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> list[tuple[int, ...]]:
    """The axes along which each leaf writes: those that its first contraction does not sum over.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs, or its shape and dtype.

    Returns:
        For each leaf, in flattening order, its axes; the last axis longer than one for a leaf that
        is in no contraction outside loops.

    Example:
        >>> find_outputs(lambda w, x: x @ w.T, np.ones((5, 3)), np.ones((1, 3)))
        [(0,)]
    """
    program = trace(apply_fn, variables, inputs)
    found: dict[int, tuple[int, ...]] = {}

    def visit(
        number: int, equation: core.JaxprEqn, operands: Sequence[_Weight | None]
    ) -> Sequence[_Weight | None]:
        del number
        for operand, free in zip(operands, _free(equation), strict=False):
            if operand is not None and operand.leaf is not None:
                axes = {operand.axes[dim] for dim in free} - {None}
                found.setdefault(operand.leaf, tuple(sorted(cast(set[int], axes))))
        return [_follow(equation, operands)] * len(equation.outvars)

    arguments = [
        _Weight(i, tuple(range(len(shape.shape)))) for i, shape in enumerate(program.shapes)
    ]
    inputs_too = [None] * len(jax.tree.leaves(inputs))
    walk(program.closed, [*arguments, *inputs_too], visit, lambda constant: _Weight())
    return [found.get(i) or _last(shape.shape) for i, shape in enumerate(program.shapes)]


def _last(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(shape) if size != 1)[-1:]


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


class _Weight(NamedTuple):
    """A value computed from leaves and constants alone: which leaf it is, laid out anew.

    Attributes:
        leaf: the leaf's number; None for a constant, or for what mixes several leaves.
        axes: for each dimension of the value, the leaf's axis there; None where there is none.
    """

    leaf: int | None = None
    axes: tuple[int | None, ...] = ()


def _free(equation: core.JaxprEqn) -> list[set[int]]:
    """For each operand of a contraction, the dimensions that reach the output as units do."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted, batch = params["dimension_numbers"]
        ranks = [len(shape_of(atom)) for atom in equation.invars]
        return [set(range(rank)) - {*contracted[i], *batch[i]} for i, rank in enumerate(ranks[:2])]
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        return [{numbers.lhs_spec[0]}, {numbers.rhs_spec[0]}]
    if name == "gather":
        rank = len(shape_of(equation.invars[0]))
        return [set(range(rank)) - set(params["dimension_numbers"].start_index_map)]
    return []


def _follow(equation: core.JaxprEqn, operands: Sequence[_Weight | None]) -> _Weight | None:
    """What an equation makes of weights; None for activations."""
    known = [operand for operand in operands if operand is not None]
    if len(known) < len(operands):
        return None
    leaves = [operand for operand in known if operand.leaf is not None]
    if len({operand.leaf for operand in leaves}) != 1:
        return _Weight()
    weight, axes = leaves[0], None
    if equation.primitive.name in ELEMENTWISE:
        before = shape_of(equation.invars[known.index(weight)])
        axes = weight.axes if before == shape_of(equation.outvars[0]) else None
    elif weight is known[0]:
        axes = moved_axes(equation, weight.axes)
    return _Weight() if axes is None else weight._replace(axes=axes)
