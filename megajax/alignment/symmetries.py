"""Permutation symmetries of a network, found from its program.

The hidden units of a layer may change places without changing the function, as long as every
weight that reads or writes them moves along. `find_symmetries` derives from the jaxpr of any
`apply_fn(variables, inputs)` which axes of which leaves move together.

The result is plain data. For most networks a group is a set of whole axes, and writing one by hand
takes a line per leaf:

    Group("hidden", 64, (
        Site("params/Dense_0/kernel", 1),
        Site("params/Dense_0/bias", 0),
        Site("params/Dense_1/kernel", 0),
    ))

Reference: Ainsworth et al., Git Re-Basin, https://arxiv.org/abs/2209.04836 (where the specification
is written by hand for each architecture).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megajax.alignment.axes import Axis, boxes
from megajax.alignment.propagation import Axes, Record, fresh, pin_all, propagate
from megajax.program.jaxprs import Program, trace
from megajax.program.roles import find_statistics
from megajax.trees import leaf_paths
from megajax.types import ApplyFn, PyTree

__all__ = [
    "Copies",
    "Group",
    "Pinned",
    "Place",
    "Reading",
    "Site",
    "Symmetries",
    "find_symmetries",
    "places",
    "read",
    "site_at",
    "sites_by_leaf",
]

Repeats = tuple[tuple[int, int], ...]


class Copies(NamedTuple):
    """Where the copies of a group lie that has a permutation for each of them.

    Attributes:
        axis: the axis of the leaf along which the copies lie.
        offset: the first index of copy 0 (counted from the site's offset if on the site's axis).
        stride: the step from one copy to the next.
        repeats: (count, stride) of each further factor of that axis.
    """

    axis: int
    offset: int = 0
    stride: int = 1
    repeats: Repeats = ()


class Site(NamedTuple):
    """A place where the units of a group sit: an axis of a leaf, or part of one.

    Unit u holds the indices `offset + u * stride + i * step` for every `i < count` of every
    `(count, step)` in `repeats`. A channel axis of C units flattened behind an image of H x W is
    `repeats=((H * W, C),)`; the second of two concatenated segments has the first's size as offset.

    Attributes:
        path: the leaf, as its keys joined by "/".
        axis: the axis of the leaf.
        offset: the first index of unit 0.
        stride: the step from one unit to the next.
        repeats: (count, stride) of each further factor of the axis.
        copies: where the copies lie, if the group has any.
    """

    path: str
    axis: int
    offset: int = 0
    stride: int = 1
    repeats: Repeats = ()
    copies: Copies | None = None

    def describe(self) -> str:
        """The place in words.

        >>> Site("w", 1, offset=4).describe()
        'w axis 1 from 4'
        """
        words = [f"{self.path} axis {self.axis}"]
        if self.offset:
            words.append(f"from {self.offset}")
        if self.stride != 1:
            words.append(f"step {self.stride}")
        words += [f"repeated {count} x {step}" for count, step in self.repeats]
        if self.copies is not None and self.copies.axis != self.axis:
            words.append(f"copies along axis {self.copies.axis}")
        return " ".join(words)


class Group(NamedTuple):
    """Hidden units that may be permuted.

    Attributes:
        name: the module that makes them.
        size: how many there are.
        sites: every place that must move with them.
        copies: how many permutations there are: one, or one for each unit of a further axis (the
            dimensions of each attention head, the channels of each group of a GroupNorm).
        within: the group whose units those copies are; None if they stay where they are.
    """

    name: str
    size: int
    sites: tuple[Site, ...]
    copies: int = 1
    within: str | None = None


class Pinned(NamedTuple):
    """An axis (or part of one) that must stay as it is, and why.

    Attributes:
        path: the leaf.
        axis: its axis.
        reason: "input", "output", or what it is that tells the entries apart.
    """

    path: str
    axis: int
    reason: str


class Symmetries(NamedTuple):
    """The permutation symmetries of a network.

    Attributes:
        groups: the groups of hidden units; a group within another comes after it.
        pinned: the axes that stay as they are.
        unknown: the primitives without a rule; all that they touch is pinned.
        statistics: paths of BatchNorm's statistics: measurements, which move along and say nothing
            of which units are alike.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...] = ()
    unknown: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()

    def describe(self) -> str:
        """A table with a line per group, its sites below it, then what is pinned and unknown.

        >>> print(Symmetries((Group("a", 4, (Site("w", 1), Site("v", 0))),)).describe())
        a: 4 units
            w axis 1
            v axis 0
        """
        lines = []
        for group in self.groups:
            copies = f", permuted for each of {group.copies}" if group.copies > 1 else ""
            within = f" units of {group.within}" if group.within else ""
            lines.append(f"{group.name}: {group.size} units{copies}{within}")
            lines += [f"    {site.describe()}" for site in group.sites]
        lines += [f"pinned: {p.path} axis {p.axis} ({p.reason})" for p in self.pinned]
        lines += [f"primitive without a rule: {name}" for name in self.unknown]
        return "\n".join(lines)


class Reading(NamedTuple):
    """The program of a network with the axes of its variables.

    Attributes:
        program: the program.
        paths: the path of each leaf of the variables, in the order of the program's arguments.
        axes: the axes of each leaf.
        record: the axes of every value of the program.
    """

    program: Program
    paths: tuple[str, ...]
    axes: tuple[Axes, ...]
    record: Record


def sites_by_leaf(groups: Iterable[Group]) -> dict[str, list[tuple[Group, Site]]]:
    """For the path of each leaf the groups that sit in it, once for every site.

    >>> sites_by_leaf([Group("a", 4, (Site("w", 1), Site("v", 0)))])["v"][0][1]
    Site(path='v', axis=0, offset=0, stride=1, repeats=(), copies=None)
    """
    found: dict[str, list[tuple[Group, Site]]] = {}
    for group in groups:
        for site in group.sites:
            found.setdefault(site.path, []).append((group, site))
    return found


def find_symmetries(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> Symmetries:
    """Finds the permutation symmetries of a network from its program, without running it.

    Every axis of every leaf is tied to the axes that have to move with it, through each primitive
    of the jaxpr. Axes tied to inputs or outputs, to integer leaves or to constants that differ
    along the axis are pinned, as is all that a primitive without a rule touches. The same program
    is read once.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> outputs`, traceable.
        variables: any pytree of arrays or `jax.ShapeDtypeStruct`s.
        inputs: any pytree of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The symmetries, in the order in which the program reads the groups.

    >>> import numpy as np
    >>> def mlp(variables, x):
    ...     return jax.nn.relu(x @ variables["w"] + variables["b"]) @ variables["v"]
    >>> variables = {"w": np.ones((3, 8)), "b": np.ones(8), "v": np.ones((8, 2))}
    >>> print(find_symmetries(mlp, variables, np.ones((1, 3))).describe())
    w: 8 units
        w axis 1
        b axis 0
        v axis 0
    pinned: v axis 1 (output)
    pinned: w axis 0 (input)
    """
    found = find_statistics(apply_fn, variables, inputs)
    leaves = tuple(sorted({leaf for one in found for leaf in (one.mean, one.variance)}))
    return _symmetries(trace(apply_fn, variables, inputs), leaves)


@functools.lru_cache(maxsize=64)
def read(program: Program) -> Reading:
    """Ties the axes of a program's variables; see `find_symmetries`.

    >>> import numpy as np
    >>> read(trace(lambda v, x: x @ v["w"], {"w": np.ones((3, 8))}, np.ones((1, 3)))).paths
    ('w',)
    """
    atoms, record = program.closed.jaxpr.invars, Record()
    paths = tuple(leaf_paths(jax.tree.unflatten(program.treedef, program.shapes)))
    args = [fresh(atom.aval.shape) for atom in atoms]
    results = propagate(program.closed, args, record)
    for i, (atom, axes) in enumerate(zip(atoms, args, strict=True)):
        if i >= len(paths):
            pin_all(axes, "input")
        elif i not in record.first:
            pin_all(axes, "unused")
        elif not jnp.issubdtype(atom.aval.dtype, jnp.floating):
            pin_all(axes, "not a float")
    for axes in results:
        pin_all(axes, "output")
    return Reading(program, paths, tuple(args[: len(paths)]), record)


@functools.lru_cache(maxsize=64)
def _symmetries(program: Program, statistics: tuple[int, ...]) -> Symmetries:
    """Collects the groups of a program."""
    _, paths, axes_of, record = read(program)
    found: dict[Axis, list[tuple[int, Place]]] = {}
    pinned = set()
    for leaf in sorted(range(len(paths)), key=lambda leaf: record.first.get(leaf, -1)):
        # The units that a leaf makes usually lie along its last axis: they give it their name.
        for place in sorted(places(axes_of[leaf]), key=lambda place: -place.axis):
            reason = place.unit.reason or ("a single unit" if place.unit.size == 1 else None)
            if reason is None:
                found.setdefault(place.unit, []).append((leaf, place))
            else:
                pinned.add(Pinned(paths[leaf], place.axis, reason))
    holders = _holders(record.values, set(found))
    found = dict(sorted(found.items(), key=lambda item: item[0] in holders))
    made_by = (paths[where[0][0]] for where in found.values())
    modules = (path.rpartition("/")[0] or path for path in made_by)
    names = dict(zip(found, _unique(modules), strict=True))
    groups = []
    for unit, where in found.items():
        holder = holders.get(unit)
        sites = tuple(site_at(axes_of[i], paths[i], place, holder) for i, place in where)
        group = Group(names[unit], unit.size, sites)
        if holder is not None:
            group = group._replace(copies=holder.size, within=names.get(holder))
        groups.append(group)
    unknown, leaves = tuple(sorted(record.unknown)), tuple(paths[i] for i in statistics)
    return Symmetries(tuple(groups), tuple(sorted(pinned)), unknown, leaves)


class Place(NamedTuple):
    """A place of an atom in an array: one factor of one box (see `megajax.alignment.axes.boxes`).

    Attributes:
        unit: the atom.
        axis: the axis of the array.
        offset: the offset of the box.
        stride: the atom's stride.
        beside: the other factors of the box, with their strides.
    """

    unit: Axis
    axis: int
    offset: int
    stride: int
    beside: tuple[tuple[Axis, int], ...]


def places(axes: Axes) -> list[Place]:
    """Where the atoms of an array's axes lie.

    >>> [(place.axis, place.unit.size) for place in places(fresh((3, 8)))]
    [(0, 3), (1, 8)]
    """
    return [
        Place(unit, axis, offset, stride, factors[:i] + factors[i + 1 :])
        for axis, whole in enumerate(axes)
        for offset, factors in boxes(whole)
        for i, (unit, stride) in enumerate(factors)
    ]


def site_at(axes: Axes, path: str, place: Place, holder: Axis | None) -> Site:
    """Describes a place.

    Args:
        axes: the axes of the array.
        path: its path.
        place: one of `places(axes)`.
        holder: the axis within whose units these are, if any.

    >>> axes = fresh((3, 8))
    >>> site_at(axes, "w", places(axes)[1], holder=None)
    Site(path='w', axis=1, offset=0, stride=1, repeats=(), copies=None)
    """
    rest = tuple(
        (unit.size, step) for unit, step in place.beside if unit is not holder and unit.size != 1
    )
    site = Site(path, place.axis, place.offset, place.stride, rest)
    if holder is None:
        return site
    steps = [step for unit, step in place.beside if unit is holder]
    if steps:
        return site._replace(copies=Copies(place.axis, 0, steps[0]))
    held = next(one for one in places(axes) if one.unit is holder)
    rest = tuple((unit.size, step) for unit, step in held.beside)
    return site._replace(copies=Copies(held.axis, held.offset, held.stride, rest))


def _holders(values: Iterable[Axes], units: set[Axis]) -> dict[Axis, Axis]:
    """For units that may be permuted differently for each entry of another axis: that axis.

    The units of an attention head, or the channels of a group of a GroupNorm, never meet those of
    another head: whatever value they appear in, the heads' axis is there as well, once. The program
    then acts on each head by itself, or sums over heads, and either commutes with a permutation
    inside each.
    """
    candidates: dict[Axis, set[Axis]] = {}
    for axes in values:
        spread = [boxes(axis) for axis in axes]
        for i, own in enumerate(spread):
            others = [
                unit
                for j, other in enumerate(spread)
                if j != i and len(other) == 1
                for unit, _ in other[0][1]
            ]
            for _, factors in own:
                count = collections.Counter([*others, *(unit for unit, _ in factors)])
                once = {unit for unit, n in count.items() if n == 1 and unit.size > 1}
                for unit, _ in factors:
                    if unit in units:
                        left = candidates.get(unit, once) & once
                        candidates[unit] = left - {unit}
    holders: dict[Axis, Axis] = {}
    for unit, left in candidates.items():
        left = {other for other in left if other not in holders}
        if left and unit not in holders.values():
            holders[unit] = max(left, key=lambda other: (other in units, other.size))
    return holders


def _unique(names: Iterable[str]) -> list[str]:
    """Numbers the second and later uses of a name."""
    seen: collections.Counter[str] = collections.Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return out
