"""Moves hidden units: permutations of the groups of `symmetries`, applied, composed and drawn."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from megajax.alignment.symmetries import Group, Site, Symmetries, sites_by_leaf
from megajax.errors import SymmetryError
from megajax.trees import leaves_by_path

__all__ = [
    "Array",
    "Permutations",
    "compose",
    "identity_permutations",
    "permute",
    "random_permutations",
    "unit_layout",
    "units_of",
    "validate",
]

Array = np.ndarray[Any, Any]
T = TypeVar("T")

Permutations = Mapping[str, Any]
"""Group name -> int array [size], or [copies, size]: unit u of the result is unit p[u] of the
source. For a group within another, row c permutes the units inside unit c of the result."""


def validate(symmetries: Symmetries, variables: Any) -> None:
    """Checks that symmetries written by hand fit the variables.

    Args:
        symmetries: the symmetries.
        variables: pytree of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        SymmetryError: a name is used twice, a leaf or an axis does not exist, or a group does not
            fit into the axis it is said to sit in.

    >>> wrong = Symmetries((Group("hidden", 4, (Site("w", 1),)),))
    >>> validate(wrong, {"w": np.ones((3, 5))})
    Traceback (most recent call last):
    megajax.errors.SymmetryError: group 'hidden': 4 units of w axis 1 do not fill its 5 entries
    """
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves_by_path(variables).items()}
    for fault in _faults(symmetries, shapes):
        raise SymmetryError(fault)


def _faults(symmetries: Symmetries, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with symmetries; only the first need make sense."""
    uses = collections.Counter(
        [(site.path, site.axis) for group in symmetries.groups for site in group.sites]
        + [(pinned.path, pinned.axis) for pinned in symmetries.pinned]
    )
    sizes: dict[str | None, int] = {}
    for group in symmetries.groups:
        name, count = f"group {group.name!r}: ", f"{group.size} units"
        if group.name in sizes:
            yield name + "the name is used twice"
        if group.within is not None and sizes.get(group.within) != group.copies:
            yield name + f"no group {group.within!r} of {group.copies} units before it"
        sizes[group.name] = group.size
        if not group.sites:
            yield name + "no sites"
        for site in group.sites:
            if site.path not in shapes:
                yield name + f"no leaf {site.path!r}"
            shape, where = shapes[site.path], f"{site.path} axis {site.axis}"
            for axis in (site.axis, *([site.copies.axis] if site.copies else [])):
                if not 0 <= axis < len(shape):
                    yield name + f"{site.path} has shape {shape}, no axis {axis}"
            if (group.copies > 1) != (site.copies is not None):
                says = "where they lie" if site.copies else "nothing of them"
                yield name + f"{group.copies} copies, but {where} says {says}"
            size, units = shape[site.axis], _indices(site.offset, _factors(group, site))
            if units.min() < 0 or units.max() >= size or len(np.unique(units)) != units.size:
                yield name + f"{count} do not fit the {size} entries of {where}"
            if uses[site.path, site.axis] == 1 and units.size != size:
                yield name + f"{count} of {where} do not fill its {size} entries"


def identity_permutations(symmetries: Symmetries) -> dict[str, Array]:
    """The permutations that leave everything in place.

    >>> identity_permutations(Symmetries((Group("a", 3, (Site("w", 0),)),)))
    {'a': array([0, 1, 2])}
    """
    return {g.name: np.broadcast_to(np.arange(g.size), _shape(g)).copy() for g in symmetries.groups}


def random_permutations(key: jax.Array, symmetries: Symmetries) -> dict[str, Array]:
    """Draws a permutation of every group, uniformly.

    Args:
        key: PRNG key.
        symmetries: the symmetries.

    Returns:
        Group name -> int array [size], or [copies, size].

    >>> one = Symmetries((Group("a", 3, (Site("w", 0),)),))
    >>> drawn = random_permutations(jax.random.key(0), one)
    >>> sorted(drawn["a"].tolist())
    [0, 1, 2]
    """
    shapes = [_shape(group) for group in symmetries.groups]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    ranks = np.split(np.asarray(jax.random.bits(key, (ends[-1] if shapes else 0,))), ends[:-1])
    return {
        group.name: rank.reshape(shape).argsort(axis=-1)
        for group, rank, shape in zip(symmetries.groups, ranks, shapes, strict=False)
    }


def compose(symmetries: Symmetries, outer: Permutations, inner: Permutations) -> dict[str, Any]:
    """The permutations that do what `inner` and then `outer` do.

    >>> one = Symmetries((Group("a", 3, (Site("w", 0),)),))
    >>> compose(one, {"a": np.array([1, 2, 0])}, {"a": np.array([2, 0, 1])})
    {'a': array([0, 1, 2])}
    """
    out = {}
    for group in symmetries.groups:
        p, q = outer[group.name], inner[group.name]
        if group.within:
            q = q[outer[group.within]]
        out[group.name] = _namespace(p, q).take_along_axis(q, p, axis=-1)
    return out


def permute(symmetries: Symmetries, permutations: Permutations, variables: T) -> T:
    """Moves the hidden units of a network; the function that it computes stays the same.

    Pure and traceable. NumPy arrays stay NumPy arrays if leaves and permutations both are.

    Args:
        symmetries: the symmetries of the network.
        permutations: group name -> int array [size] (or [copies, size]); groups left out stay.
        variables: pytree of arrays.

    Returns:
        The variables, of the same structure, shapes and dtypes.

    Raises:
        SymmetryError: a group or a leaf that does not exist is named.

    >>> two = Symmetries((Group("a", 2, (Site("w", 1), Site("v", 0))),))
    >>> variables = {"w": np.array([[1.0, 2.0]]), "v": np.array([3.0, 4.0])}
    >>> permute(two, {"a": np.array([1, 0])}, variables)
    {'v': array([4., 3.]), 'w': array([[2., 1.]])}
    """
    names = {group.name for group in symmetries.groups}
    for name in permutations:
        if name not in names:
            raise SymmetryError(f"permutation of {name!r}: no such group")
    sites = sites_by_leaf(group for group in symmetries.groups if group.name in permutations)
    leaves = leaves_by_path(variables)
    for path in sites:
        if path not in leaves:
            raise SymmetryError(f"group {sites[path][0][0].name!r}: no leaf {path!r}")
    moved = [_move(leaf, sites.get(path, ()), permutations) for path, leaf in leaves.items()]
    return cast(T, jax.tree.unflatten(jax.tree.structure(variables), moved))


def units_of(leaf: Any, group: Group, site: Site) -> Any:
    """What an array holds for each unit of a group.

    Args:
        leaf: an array with the group at `site`.
        group: the group.
        site: where it sits.

    Returns:
        Array [copies, size, features], the features in the same order for every unit.

    >>> hidden = Group("hidden", 3, (Site("w", 1),))
    >>> units_of(np.arange(6).reshape(2, 3), hidden, hidden.sites[0])
    array([[[0, 3], [1, 4], [2, 5]]])
    """
    shape = (group.copies, group.size, -1)
    units = _indices(site.offset, _factors(group, site))
    xp = _namespace(leaf)
    if site.copies is None or site.copies.axis == site.axis:
        return xp.moveaxis(leaf, site.axis, 0)[units].reshape(shape)
    held = ((group.copies, site.copies.stride), *site.copies.repeats)
    copies = _indices(site.copies.offset, held).reshape(group.copies, 1, -1, 1)
    moved = xp.moveaxis(leaf, (site.copies.axis, site.axis), (0, 1))
    return moved[copies, units.reshape(1, group.size, 1, -1)].reshape(shape)


def unit_layout(group: Group, site: Site, shape: Sequence[int]) -> tuple[Array, Array]:
    """Which unit, and which copy of the group, each entry of a leaf's axes belongs to.

    Args:
        group: the group.
        site: where it sits in the leaf.
        shape: the leaf's shape.

    Returns:
        The copy of each entry along the axis of the copies (the site's axis if there are none), and
        the unit of each entry along the site's axis: int arrays, -1 where the group is not.

    >>> hidden = Group("hidden", 2, (Site("w", 1, offset=1),))
    >>> [entries.tolist() for entries in unit_layout(hidden, hidden.sites[0], (3, 4))]
    [[-1, 0, 0, -1], [-1, 0, 1, -1]]
    """
    here, there = _layouts(group, site, shape)
    unit = np.where(here.stride != 0, here.unit, -1)
    copies = there or here
    return np.where(copies.stride != 0, copies.copy, -1), unit


def _shape(group: Group) -> tuple[int, ...]:
    return (group.size,) if group.copies == 1 else (group.copies, group.size)


def _factors(group: Group, site: Site) -> list[tuple[int, int]]:
    """(count, stride) of the copies (if they lie on the axis), the units and the repeats."""
    same = site.copies is not None and site.copies.axis == site.axis
    copies = (group.copies, site.copies.stride) if same and site.copies else (1, 1)
    return [copies, (group.size, site.stride), *site.repeats]


def _indices(offset: int, factors: Sequence[tuple[int, int]]) -> Array:
    """The entries `offset + sum(unit * stride)`, with an axis per factor."""
    grids = np.ix_(*(np.arange(count) * stride for count, stride in factors))
    return np.asarray(offset + sum(grids))


class _Layout(NamedTuple):
    """For every entry of an axis: its copy, its unit, and how far apart units lie there (or 0)."""

    copy: Array
    unit: Array
    stride: Array


@functools.lru_cache(maxsize=4096)
def _layout(offset: int, factors: tuple[tuple[int, int], ...], size: int) -> _Layout:
    entries = _indices(offset, factors)
    copy, unit, stride = np.zeros((3, size), np.int32)
    along = np.indices(entries.shape)
    copy[entries], unit[entries], stride[entries] = along[0], along[1], factors[1][1]
    return _Layout(copy, unit, stride)


def _layouts(group: Group, site: Site, shape: Sequence[int]) -> tuple[_Layout, _Layout | None]:
    """The layouts of the site's axis, and of the axis of the copies if that is another."""
    here = _layout(site.offset, tuple(_factors(group, site)), shape[site.axis])
    if site.copies is None or site.copies.axis == site.axis:
        return here, None
    held = ((group.copies, site.copies.stride), (1, 1), *site.copies.repeats)
    return here, _layout(site.copies.offset, held, shape[site.copies.axis])


def _source(group: Group, site: Site, p: Any, shape: Sequence[int]) -> tuple[Any, int | None]:
    """Where each entry of the site's axis comes from, and the axis that this depends on, if any."""
    here, there = _layouts(group, site, shape)
    entry = np.arange(shape[site.axis], dtype=np.int32)
    p = p.reshape(group.copies, group.size)
    if site.copies is None or there is None:
        return entry + here.stride * (p[here.copy, here.unit] - here.unit), None
    inside = (there.stride[:, None] != 0) * here.stride
    return entry + inside * (p[there.copy][:, here.unit] - here.unit), site.copies.axis


def _move(leaf: Any, sites: Sequence[tuple[Group, Site]], permutations: Permutations) -> Any:
    """Moves all units that sit in one leaf: whole axes first, then those that depend on another."""
    whole: dict[int, Any] = {}
    dependent = []
    for group, site in sites:
        source, other = _source(group, site, permutations[group.name], leaf.shape)
        if other is None:
            before = whole.get(site.axis)
            whole[site.axis] = source if before is None else before[source]
        else:
            dependent.append((source, site.axis, other))
    for axis, source in whole.items():
        leaf = _namespace(leaf, source).take(leaf, source, axis=axis, mode="clip")
    for source, axis, other in dependent:
        if other > axis:
            source = source.T
        source = source.reshape([n if i in (axis, other) else 1 for i, n in enumerate(leaf.shape)])
        leaf = _namespace(leaf, source).take_along_axis(leaf, source, axis=axis)
    return leaf


def _namespace(*arrays: Any) -> Any:
    """NumPy if all arrays are NumPy's, else JAX."""
    return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp
