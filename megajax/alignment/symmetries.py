"""Permutation symmetries of a network, found from its program.

The hidden units of a layer may change places without changing the function, as long as every
weight that reads or writes them moves along. `find_symmetries` derives from the jaxpr of any
`apply_fn(variables, inputs)` which axes of which leaves move together; `permute` moves them, and
`verify` checks that the function stays the same.

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
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from megajax.alignment.axes import Axis, Box, boxes
from megajax.alignment.propagation import Axes, Record, fresh, pin_all, propagate
from megajax.errors import SymmetryError
from megajax.program import jaxprs as programs
from megajax.trees import leaves_by_path

__all__ = [
    "Copies",
    "Group",
    "Permutations",
    "Pinned",
    "Site",
    "Symmetries",
    "Trace",
    "compose",
    "find_symmetries",
    "identity_permutations",
    "invert_permutations",
    "permute",
    "random_permutations",
    "site_at",
    "symmetries_of",
    "trace",
    "unit_layout",
    "units_of",
    "validate",
    "verify",
]

ApplyFn = Callable[[Any, Any], Any]
Array = np.ndarray[Any, Any]
T = TypeVar("T")

Permutations = Mapping[str, Any]
"""Group name -> int array [size], or [copies, size]: unit u of the result is unit p[u] of the
source. For a group within another, row c permutes the units inside unit c of the result."""

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
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...] = ()
    unknown: tuple[str, ...] = ()

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
            lines += [f"    {_describe(site)}" for site in group.sites]
        lines += [f"pinned: {p.path} axis {p.axis} ({p.reason})" for p in self.pinned]
        lines += [f"primitive without a rule: {name}" for name in self.unknown]
        return "\n".join(lines)


class Trace(NamedTuple):
    """The program of a network with the axes of its variables.

    Attributes:
      closed: the program.
      paths: the path of each leaf of the variables, in the order of the program's arguments.
      axes: the axes of each leaf.
      record: the axes of every value of the program.
      unused: the paths of the leaves that the program never reads.
      order: the paths, in the order in which the program reads them.
    """

    closed: core.ClosedJaxpr
    paths: tuple[str, ...]
    axes: tuple[Axes, ...]
    record: Record
    unused: frozenset[str]
    order: tuple[str, ...]


def find_symmetries(apply_fn: ApplyFn, variables: Any, inputs: Any) -> Symmetries:
    """Finds the permutation symmetries of a network from its program, without running it.

    Every axis of every leaf is tied to the axes that have to move with it, through each primitive
    of the jaxpr. Axes tied to inputs or outputs, to integer leaves or to constants that differ
    along the axis are pinned, as is all that a primitive without a rule touches.

    Args:
      apply_fn: `apply_fn(variables, inputs) -> outputs`, traceable.
      variables: any pytree of arrays or `jax.ShapeDtypeStruct`s.
      inputs: any pytree of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The symmetries, in the order in which the program reads the groups.

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
    return symmetries_of(trace(apply_fn, variables, inputs))


def trace(apply_fn: ApplyFn, variables: Any, inputs: Any) -> Trace:
    """Traces a network and ties the axes of its variables; see `find_symmetries`.

    >>> trace(lambda v, x: x @ v["w"], {"w": np.ones((3, 8))}, np.ones((1, 3))).paths
    ('w',)
    """
    closed = programs.trace(apply_fn, variables, inputs).closed
    paths = tuple(leaves_by_path(variables))
    args = [fresh(x.aval.shape) for x in closed.jaxpr.invars]
    axes = tuple(args[: len(paths)])
    record = Record()
    results = propagate(closed, args, record)
    unused = frozenset(
        path for i, path in enumerate(paths) if i not in record.first and axes[i] != ()
    )
    for path, x, leaf in zip(paths, closed.jaxpr.invars, axes, strict=False):
        if path in unused:
            pin_all(leaf, "unused")
        if not jnp.issubdtype(x.aval.dtype, jnp.floating):
            pin_all(leaf, "not a float")
    for arg in args[len(paths) :]:
        pin_all(arg, "input")
    for out in results:
        pin_all(out, "output")
    order = tuple(sorted(paths, key=lambda path: record.first.get(paths.index(path), -1)))
    return Trace(closed, paths, axes, record, unused, order)


def symmetries_of(traced: Trace) -> Symmetries:
    """Collects the groups of a traced network; see `find_symmetries`.

    >>> symmetries_of(trace(lambda v, x: x @ v["w"], {"w": np.ones((3, 8))}, np.ones((1, 3))))
    Symmetries(groups=(), pinned=(Pinned(path='w', axis=0, reason='input'),
    Pinned(path='w', axis=1, reason='output')), unknown=())
    """
    rank = {path: i for i, path in enumerate(traced.order)}
    leaves = sorted(zip(traced.paths, traced.axes, strict=True), key=lambda leaf: rank[leaf[0]])
    found: dict[Axis, list[tuple[str, int, int, int]]] = {}
    pinned = set()
    for path, axes in leaves:
        # The units that a leaf makes usually lie along its last axis: they give it their name.
        for axis in reversed(range(len(axes))):
            for at, (_, factors) in enumerate(_boxes(axes[axis])):
                for factor, (unit, _) in enumerate(factors):
                    if unit.size == 1:
                        pinned.add(Pinned(path, axis, unit.reason or "a single unit"))
                    elif unit.reason is None:
                        found.setdefault(unit, []).append((path, axis, at, factor))
                    else:
                        pinned.add(Pinned(path, axis, unit.reason))
    holders = _holders(traced.record.values, set(found))
    found = dict(sorted(found.items(), key=lambda item: item[0] in holders))
    names = dict(zip(found, _unique(_module(where[0][0]) for where in found.values()), strict=True))
    by_path = dict(zip(traced.paths, traced.axes, strict=True))
    groups = [
        Group(
            names[unit],
            unit.size,
            tuple(site_at(by_path[path], path, axis, at, factor, holders.get(unit))
                  for path, axis, at, factor in where),
            holders[unit].size if unit in holders else 1,
            names.get(holders[unit]) if unit in holders else None,
        )
        for unit, where in found.items()
    ]  # fmt: skip
    unknown = tuple(sorted(traced.record.unknown))
    return Symmetries(tuple(groups), tuple(sorted(pinned)), unknown)


def validate(symmetries: Symmetries, variables: Any) -> None:
    """Checks that symmetries written by hand fit the variables.

    Args:
      symmetries: the symmetries.
      variables: pytree of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      SymmetryError: a name is used twice, a leaf or an axis does not exist, or a group does not fit
        into the axis it is said to sit in.

    >>> wrong = Symmetries((Group("hidden", 4, (Site("w", 1),)),))
    >>> validate(wrong, {"w": np.ones((3, 5))})
    Traceback (most recent call last):
    megajax.errors.SymmetryError: group 'hidden': 4 units of w axis 1 do not fill its 5 entries
    """
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves_by_path(variables).items()}
    uses = collections.Counter(
        [(site.path, site.axis) for group in symmetries.groups for site in group.sites]
        + [(pinned.path, pinned.axis) for pinned in symmetries.pinned]
    )
    seen: dict[str, Group] = {}
    for group in symmetries.groups:
        if group.name in seen:
            raise SymmetryError(f"group {group.name!r}: the name is used twice")
        if group.within is not None and (
            group.within not in seen or seen[group.within].size != group.copies
        ):
            raise SymmetryError(
                f"group {group.name!r}: no group {group.within!r} of {group.copies} units before it"
            )
        seen[group.name] = group
        if not group.sites:
            raise SymmetryError(f"group {group.name!r}: no sites")
        for site in group.sites:
            shape = shapes.get(site.path)
            if shape is None:
                raise SymmetryError(f"group {group.name!r}: no leaf {site.path!r}")
            for axis in (site.axis, *([site.copies.axis] if site.copies else [])):
                if not 0 <= axis < len(shape):
                    raise SymmetryError(
                        f"group {group.name!r}: {site.path} has shape {shape}, no axis {axis}"
                    )
            if (group.copies > 1) != (site.copies is not None):
                raise SymmetryError(
                    f"group {group.name!r}: {group.copies} copies, but {site.path} axis "
                    f"{site.axis} says {'where they lie' if site.copies else 'nothing of them'}"
                )
            size = shape[site.axis]
            units = _indices(site.offset, _factors(group, site))
            if units.min() < 0 or units.max() >= size or len(np.unique(units)) != units.size:
                raise SymmetryError(
                    f"group {group.name!r}: {group.size} units do not fit the {size} entries of "
                    f"{site.path} axis {site.axis}"
                )
            alone = uses[site.path, site.axis] == 1
            if alone and units.size != size:
                raise SymmetryError(
                    f"group {group.name!r}: {group.size} units of {site.path} axis {site.axis} "
                    f"do not fill its {size} entries"
                )


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
    ranks = _split_flat(np.asarray(jax.random.bits(key, (_total(shapes),))), shapes)
    return {
        group.name: rank.argsort(axis=-1)
        for group, rank in zip(symmetries.groups, ranks, strict=True)
    }


def invert_permutations(symmetries: Symmetries, permutations: Permutations) -> dict[str, Any]:
    """The permutations that undo the given ones.

    >>> one = Symmetries((Group("a", 3, (Site("w", 0),)),))
    >>> invert_permutations(one, {"a": np.array([1, 2, 0])})
    {'a': array([2, 0, 1])}
    """
    inverse = {name: p.argsort(axis=-1) for name, p in permutations.items()}
    return {
        group.name: inverse[group.name][inverse[group.within]]
        if group.within
        else inverse[group.name]
        for group in symmetries.groups
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
    groups = {group.name: group for group in symmetries.groups}
    for name in permutations:
        if name not in groups:
            raise SymmetryError(f"permutation of {name!r}: no such group")
    sites: dict[str, list[tuple[Group, Site]]] = collections.defaultdict(list)
    for group in symmetries.groups:
        if group.name in permutations:
            for site in group.sites:
                sites[site.path].append((group, site))
    leaves = leaves_by_path(variables)
    for path in sites:
        if path not in leaves:
            raise SymmetryError(f"group {sites[path][0][0].name!r}: no leaf {path!r}")
    moved = [_move(leaf, sites[path], permutations) for path, leaf in leaves.items()]
    return cast(T, jax.tree.unflatten(jax.tree.structure(variables), moved))


def verify(
    key: jax.Array,
    symmetries: Symmetries,
    apply_fn: ApplyFn,
    variables: Any,
    inputs: Any,
    *,
    tolerance: float = 1e-4,
    draws: int = 3,
) -> None:
    """Checks that permuting the hidden units leaves the outputs alone.

    The variables are perturbed first, for fresh ones (zero biases, unit variances) would hide a
    leaf that a group has forgotten. All groups are permuted at once; if the outputs change, they
    are permuted one by one to tell which is at fault.

    Args:
      key: PRNG key, for the perturbation and the permutations.
      symmetries: the symmetries, found or written by hand.
      apply_fn: `apply_fn(variables, inputs) -> outputs`.
      variables: pytree of arrays.
      inputs: pytree of arrays; random ones will do.
      tolerance: the largest change of an output allowed, relative to the largest output (float32
        sums in another order differ).
      draws: how often to perturb and permute: a unit that is dead in one draw hides its errors.

    Raises:
      SymmetryError: the symmetries do not fit the variables, or a group is wrong; the message names
        it and its leaves.

    >>> def mlp(variables, x):
    ...     return jax.nn.relu(x @ variables["w"] + variables["b"]) @ variables["v"]
    >>> variables = {"w": jnp.ones((3, 8)), "b": jnp.zeros(8), "v": jnp.ones((8, 2))}
    >>> forgot_the_bias = Symmetries((Group("hidden", 8, (Site("w", 1), Site("v", 0))),))
    >>> verify(jax.random.key(0), forgot_the_bias, mlp, variables, jnp.ones((4, 3)))
    Traceback (most recent call last):
    megajax.errors.SymmetryError: group 'hidden' changes the outputs by ...: w axis 1, v axis 0
    """
    validate(symmetries, variables)
    still = identity_permutations(symmetries)

    @jax.jit
    def outputs(permutations: Permutations, variables: Any, inputs: Any) -> list[jax.Array]:
        return jax.tree.leaves(apply_fn(permute(symmetries, permutations, variables), inputs))

    for each in jax.random.split(key, draws):
        noise, draw = jax.random.split(each)
        perturbed = _perturb(noise, variables)
        drawn = random_permutations(draw, symmetries)
        before = outputs(still, perturbed, inputs)
        by = _change(before, outputs(drawn, perturbed, inputs))
        if by <= tolerance:
            continue
        for group in symmetries.groups:
            alone = {**still, group.name: drawn[group.name]}
            by = _change(before, outputs(alone, perturbed, inputs))
            if not by <= tolerance:
                where = ", ".join(map(_describe, group.sites))
                raise SymmetryError(
                    f"group {group.name!r} changes the outputs by {by:.2g}: {where}"
                )
        raise SymmetryError("the groups change the outputs together, though none does alone")


def _change(before: Sequence[jax.Array], after: Sequence[jax.Array]) -> float:
    """The largest change of an output, relative to the largest; NaN if one is not finite."""
    changes = []
    for a, b in zip(before, after, strict=True):
        by, largest = float(np.abs(b - a).max()), float(np.abs(a).max())
        changes.append(by / largest if largest else (math.inf if by else 0.0))
    return float(np.max(changes))


def site_at(axes: Axes, path: str, axis: int, at: int, factor: int, holder: Axis | None) -> Site:
    """Describes where one factor of one box of an axis lies.

    Args:
      axes: the axes of the array.
      path: its path.
      axis: the axis.
      at: the number of the box (see `megajax.alignment.axes.boxes`).
      factor: the number of the factor in the box.
      holder: the axis within whose units these are, if any.

    >>> site_at(fresh((3, 8)), "w", axis=1, at=0, factor=0, holder=None)
    Site(path='w', axis=1, offset=0, stride=1, repeats=(), copies=None)
    """
    offset, factors = _boxes(axes[axis])[at]
    stride = factors[factor][1]
    rest = tuple(
        (unit.size, step)
        for i, (unit, step) in enumerate(factors)
        if i != factor and unit is not holder and unit.size != 1
    )
    if holder is None:
        return Site(path, axis, offset, stride, rest)
    beside = [step for unit, step in factors if unit is holder]
    copies = Copies(axis, 0, beside[0]) if beside else _copies(axes, holder)
    return Site(path, axis, offset, stride, rest, copies)


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
    here = _layout(site.offset, tuple(_factors(group, site)), shape[site.axis])
    unit = np.where(here.stride != 0, here.unit, -1)
    if site.copies is None or site.copies.axis == site.axis:
        return np.where(here.stride != 0, here.copy, -1), unit
    held = ((group.copies, site.copies.stride), (1, 1), *site.copies.repeats)
    there = _layout(site.copies.offset, held, shape[site.copies.axis])
    return np.where(there.stride != 0, there.copy, -1), unit


# Reading the trace.


def _boxes(axis: Axis | None) -> list[Box]:
    return [] if axis is None else boxes(axis)


def _holders(values: Iterable[Axes], units: set[Axis]) -> dict[Axis, Axis]:
    """For units that may be permuted differently for each entry of another axis: that axis.

    The units of an attention head, or the channels of a group of a GroupNorm, never meet those of
    another head: whatever value they appear in, the heads' axis is there as well, once. The program
    then acts on each head by itself, or sums over heads, and either commutes with a permutation
    inside each.
    """
    candidates: dict[Axis, set[Axis]] = {}
    for axes in values:
        spread = [_boxes(axis) for axis in axes]
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


def _copies(axes: Axes, holder: Axis) -> Copies:
    for axis, whole in enumerate(map(_boxes, axes)):
        for offset, factors in whole:
            for unit, stride in factors:
                if unit is holder:
                    rest = ((u.size, step) for u, step in factors if u is not holder)
                    return Copies(axis, offset, stride, tuple(rest))
    raise AssertionError("units without those that hold them")


def _module(path: str) -> str:
    return path.rpartition("/")[0] or path


def _unique(names: Iterable[str]) -> list[str]:
    """Numbers the second and later uses of a name."""
    seen: collections.Counter[str] = collections.Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return out


def _describe(site: Site) -> str:
    words = [f"{site.path} axis {site.axis}"]
    if site.offset:
        words.append(f"from {site.offset}")
    if site.stride != 1:
        words.append(f"step {site.stride}")
    words += [f"repeated {count} x {step}" for count, step in site.repeats]
    if site.copies is not None and site.copies.axis != site.axis:
        words.append(f"copies along axis {site.copies.axis}")
    return " ".join(words)


# Moving units.


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


def _source(group: Group, site: Site, p: Any, shape: Sequence[int]) -> tuple[Any, int | None]:
    """Where each entry of the site's axis comes from, and the axis that this depends on, if any."""
    size = shape[site.axis]
    here = _layout(site.offset, tuple(_factors(group, site)), size)
    entry = np.arange(size, dtype=np.int32)
    if site.copies is None:
        return entry + here.stride * (p[here.unit] - here.unit), None
    if site.copies.axis == site.axis:
        return entry + here.stride * (p[here.copy, here.unit] - here.unit), None
    held = ((group.copies, site.copies.stride), (1, 1), *site.copies.repeats)
    there = _layout(site.copies.offset, held, shape[site.copies.axis])
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


def _perturb(key: jax.Array, variables: T) -> T:
    """Makes every entry different; leaves without a negative entry stay so."""
    leaves, structure = jax.tree.flatten(variables)
    shapes = [np.shape(leaf) for leaf in leaves]
    # One draw for all leaves: a draw for each would be compiled for each shape.
    noise = np.asarray(jax.random.normal(key, (2, _total(shapes)), jnp.float32))
    moved = [
        _jitter(np.asarray(leaf), scale, shift) if jnp.issubdtype(leaf.dtype, np.floating) else leaf
        for leaf, scale, shift in zip(
            leaves, _split_flat(noise[0], shapes), _split_flat(noise[1], shapes), strict=True
        )
    ]
    return cast(T, jax.tree.unflatten(structure, moved))


def _jitter(leaf: Array, scale: Array, shift: Array) -> Array:
    signed = leaf.size and (leaf.min() < 0 or leaf.max() == 0)
    spread = signed * (0.1 + 0.5 * leaf.std()) if leaf.size else 0.0
    return np.asarray(leaf * np.exp(0.3 * scale) + spread * shift, leaf.dtype)


def _total(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _split_flat(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Cuts a vector into arrays of the given shapes."""
    ends = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
    return [flat[a:b].reshape(shape) for a, b, shape in zip(ends, ends[1:], shapes, strict=False)]
