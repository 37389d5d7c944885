"""Matching: brings the hidden units of independently trained networks into correspondence.

Weight matching (Git Re-Basin, https://arxiv.org/abs/2209.04836) permutes the units of one network
so that its weights lie as close as possible to another's: coordinate descent over the groups, a
linear assignment for each. Activation matching pairs the units whose activations on calibration
inputs correlate best. Several networks are brought to one of them or to their common mean
(MergeMany of the same paper).

The assignments are solved by `scipy.optimize.linear_sum_assignment`. On a CPU it needs 0.1, 0.6 and
11 ms for 64, 256 and 512 units, `optax.assignment.hungarian_algorithm` 0.2, 2.7 and 3.4 ms, and
0.4 s more to compile for every new size; networks such as DenseNet have many sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from megajax.alignment.axes import Axis
from megajax.alignment.permutations import (
    Array,
    Permutations,
    compose,
    identity_permutations,
    permute,
    units_of,
    validate,
)
from megajax.alignment.propagation import Axes
from megajax.alignment.symmetries import (
    Group,
    Reading,
    Site,
    Symmetries,
    places,
    read,
    site_at,
    sites_by_leaf,
)
from megajax.errors import ConfigError, DataError, ParentsError
from megajax.program.jaxprs import run_equation, static, trace, walk
from megajax.trees import leaves_by_path
from megajax.types import ApplyFn

__all__ = ["Alignment", "activation_matching", "match", "weight_matching"]

Leaves = dict[str, Array]
Similarity = Callable[[Group, bool], Array | None]
"""(group, across) -> how alike the units of the target (rows) and of the network (columns) are:
[copies, size, size] or, across copies, [copies, copies, size, size]. None if nothing is known."""


class Alignment(NamedTuple):
    """How parents were aligned.

    Attributes:
        permutations: for each parent, what `permute` applied to it.
        objective: what matching maximises, where it started and after each sweep: the sum over
            aligned pairs of the inner product of their weights or, for activations, of the
            correlations of matched units. It never decreases.
    """

    permutations: tuple[dict[str, Array], ...]
    objective: tuple[float, ...]


def match(
    key: jax.Array,
    symmetries: Symmetries,
    parents: Sequence[Any],
    *,
    method: str = "weights",
    reference: int | str = 0,
    apply_fn: ApplyFn | None = None,
    inputs: Any = None,
    ignore: Collection[str] | None = None,
    max_sweeps: int = 100,
) -> tuple[list[Any], Alignment]:
    """Permutes the hidden units of each parent to match those of the others.

    The parents' functions stay the same. Deterministic: the same key gives the same permutations.

    Args:
        key: PRNG key, for the order in which groups are visited.
        symmetries: the symmetries of the network, from `find_symmetries` or written by hand.
        parents: K variable pytrees of one structure.
        method: "weights", "activations" or "both" (activations, then weights from there).
        reference: the number of the parent that the others are aligned to, or "mean": each is
            aligned to the sum of the others, in turn, until none moves (for the activations of
            "both", to parent 0 first).
        apply_fn: the network; only for activations.
        inputs: calibration inputs; only for activations.
        ignore: paths of leaves that move but do not count; None means BatchNorm's statistics, whose
            scale would drown the weights: on a pair of trained ResNet-8 the re-estimated midpoint
            reached 63 % without them, 45 % with them.
        max_sweeps: visits of all groups before giving up on convergence.

    Returns:
        The K aligned parents (the same leaves, dtypes included, in another order), and what was
        done.

    Raises:
        SymmetryError: the symmetries do not fit the parents.
        ParentsError: a parent has other leaves, or there is no such reference.
        ConfigError: there is no such method, or it lacks `apply_fn` and `inputs`.

    References: Ainsworth et al. 2022, Git Re-Basin, algorithms 1 (weight matching) and 2
    (MergeMany), and section 3.1 (activation matching).

    >>> from megajax.alignment.symmetries import Site
    >>> hidden = Symmetries((Group("hidden", 2, (Site("w", 1), Site("v", 0))),))
    >>> parent = {"w": np.array([[1.0, 2.0]]), "v": np.array([3.0, 4.0])}
    >>> other = {"w": np.array([[2.0, 1.0]]), "v": np.array([4.0, 3.0])}
    >>> (_, moved), info = match(jax.random.key(0), hidden, [parent, other])
    >>> moved, info.permutations[1]
    ({'v': array([3., 4.]), 'w': array([[1., 2.]])}, {'hidden': array([1, 0])})
    """
    if method not in ("weights", "activations", "both"):
        raise ConfigError(f"method is {method!r}: choose weights, activations or both")
    if reference == "mean" and method == "activations":
        raise ConfigError("reference is 'mean': only weights can be matched to a mean")
    if reference != "mean" and reference not in range(len(parents)):
        raise ParentsError(f"reference is {reference!r}: the parents are 0 to {len(parents) - 1}")
    structure = str(jax.tree.structure(parents[0]))
    for k, parent in enumerate(parents):
        if str(jax.tree.structure(parent)) != structure:
            raise ParentsError(f"parent {k} has other leaves than parent 0")
        validate(symmetries, parent)

    start = [identity_permutations(symmetries) for _ in parents]
    objective: tuple[float, ...] = ()
    if method != "weights":
        if apply_fn is None or inputs is None:
            raise ConfigError(f"method is {method!r}: it needs apply_fn and inputs")
        fixed = int(reference) if reference != "mean" else 0
        start, objective = activation_matching(symmetries, parents, apply_fn, inputs, fixed)
    if method != "activations":
        start, objective = weight_matching(
            key,
            symmetries,
            parents,
            reference,
            start=start if method == "both" else None,
            ignore=ignore,
            max_sweeps=max_sweeps,
        )
    aligned = [permute(symmetries, p, v) for p, v in zip(start, parents, strict=True)]
    return aligned, Alignment(tuple(start), objective)


# Assignments.


def _step(symmetries: Symmetries, group: Group, similarity: Similarity) -> dict[str, Array]:
    """The best move of a group, and of those within it, given how alike the units are."""
    own = similarity(group, False)
    held = [other for other in symmetries.groups if other.within == group.name]
    within = {other.name: block for other in held if (block := similarity(other, True)) is not None}
    if not within:
        if own is None:
            return {}
        best = np.stack([_assign(copy) for copy in own])
        return {group.name: best if group.copies > 1 else best[0]}
    # A unit of the group is as much like another as what is within them can be made to be.
    score = np.zeros((group.size, group.size)) if own is None else own[0]
    matched = {}
    for name, block in within.items():
        matched[name] = np.array([[_assign(pair) for pair in row] for row in block])
        score = score + np.take_along_axis(block, matched[name][..., None], -1).sum((-2, -1))
    best = _assign(score)
    return {group.name: best, **{name: p[np.arange(len(p)), best] for name, p in matched.items()}}


def _assign(similarity: Array) -> Array:
    """For each row the column that it is matched with, for the largest sum."""
    from scipy.optimize import linear_sum_assignment  # slow to load, and needed here alone

    return np.asarray(linear_sum_assignment(similarity, maximize=True)[1])


def _compare(a: Any, b: Any, across: bool) -> Any:
    """Inner products of the units of two arrays [copies, size, features]."""
    b = b.swapaxes(-1, -2)
    return a[:, None] @ b[None] if across else a @ b


# Weight matching.


def weight_matching(
    key: jax.Array,
    symmetries: Symmetries,
    parents: Sequence[Any],
    reference: int | str = 0,
    *,
    start: Sequence[Permutations] | None = None,
    ignore: Collection[str] | None = None,
    max_sweeps: int = 100,
) -> tuple[list[dict[str, Array]], tuple[float, ...]]:
    """Finds permutations that bring the weights of parents close to each other.

    A local search, so the start matters. Unless one is given there are two, and the better end is
    kept: the parents as they are, and a single pass in program order that matches each group by the
    weights that tie it to groups already matched. That pass alone undoes a permutation exactly.

    Args:
        key: PRNG key, for the order in which groups are visited.
        symmetries: the symmetries.
        parents: K variable pytrees.
        reference: the number of the parent that the others are matched to, or "mean".
        start: permutations of each parent to start from.
        ignore: paths of leaves that do not count, as in `match`.
        max_sweeps: visits of all groups before giving up on convergence.

    Returns:
        The permutations of each parent, and the sum of the inner products of matched parents, at
        the start that led furthest and after each sweep from there.

    >>> from megajax.alignment.symmetries import Site
    >>> hidden = Symmetries((Group("hidden", 2, (Site("w", 1),)),))
    >>> parents = [{"w": np.array([[1.0, 2.0]])}, {"w": np.array([[2.0, 1.0]])}]
    >>> weight_matching(jax.random.key(0), hidden, parents)
    ([{'hidden': array([0, 1])}, {'hidden': array([1, 0])}], (4.0, 5.0))
    """
    search = _search(symmetries, parents, reference, ignore)
    starts = [search.permutations, _first_pass(search)] if start is None else [start]
    runs = [_descend(key, _started(search, one), max_sweeps) for one in starts]
    return max(runs, key=lambda run: run[1][-1])


class _Search(NamedTuple):
    """A search for permutations that align the weights of parents.

    Attributes:
        symmetries: the symmetries, without the leaves that do not count.
        at: for each leaf that counts, the groups that sit in it, once for every site.
        reference: the parent that the others are aligned to, or "mean".
        permutations: those of each parent, so far.
        leaves: the leaves that count of each parent, as these place them, in float64.
    """

    symmetries: Symmetries
    at: dict[str, list[Group]]
    reference: int | str
    permutations: list[dict[str, Array]]
    leaves: list[Leaves]


def _search(
    symmetries: Symmetries,
    parents: Sequence[Any],
    reference: int | str,
    ignore: Collection[str] | None,
) -> _Search:
    ignore = symmetries.statistics if ignore is None else ignore
    groups = tuple(
        group._replace(sites=tuple(site for site in group.sites if site.path not in ignore))
        for group in symmetries.groups
    )
    at = {path: [group for group, _ in held] for path, held in sites_by_leaf(groups).items()}
    leaves = [
        {p: np.asarray(leaf, np.float64) for p, leaf in leaves_by_path(parent).items() if p in at}
        for parent in parents
    ]
    identity = [identity_permutations(symmetries) for _ in parents]
    return _Search(Symmetries(groups), at, reference, identity, leaves)


def _started(search: _Search, start: Sequence[Permutations]) -> _Search:
    """A search that nothing has moved in yet, from a start."""
    pairs = zip(start, search.leaves, strict=True)
    moved = [permute(search.symmetries, p, leaves) for p, leaves in pairs]
    return search._replace(permutations=[dict(p) for p in start], leaves=moved)


def _moving(search: _Search) -> list[int]:
    return [k for k in range(len(search.leaves)) if k != search.reference]


def _target(search: _Search, k: int, paths: Collection[str]) -> Leaves:
    """What parent k is aligned to."""
    if isinstance(search.reference, int):
        return {path: search.leaves[search.reference][path] for path in paths}
    others = [leaves for j, leaves in enumerate(search.leaves) if j != k]
    return {path: np.sum([leaves[path] for leaves in others], axis=0) for path in paths}


def _objective(search: _Search) -> float:
    """The sum of the inner products of all pairs that are aligned with each other."""
    pairs = [_inner(_target(search, k, search.at), search.leaves[k]) for k in _moving(search)]
    return math.fsum(pairs) / (1 if isinstance(search.reference, int) else 2)


def _inner(a: Leaves, b: Leaves) -> float:
    return math.fsum(float(np.vdot(leaf, b[path])) for path, leaf in a.items())


def _weight_similarity(
    search: _Search, target: Leaves, leaves: Leaves, known: Collection[str] | None = None
) -> Similarity:
    """Inner products of the weights that read or write a unit.

    Given the groups that are already matched, only weights whose other units they are count.
    """

    def counts(group: Group, path: str) -> bool:
        names = [other.name for other in search.at[path]]
        if any(other.within == group.name for other in search.at[path]):
            return False  # It counts for what is within the group.
        if known is None:
            return True
        others = {name for name in names if name not in (group.name, group.within)}
        return names.count(group.name) == 1 and others <= set(known)

    def similarity(group: Group, across: bool) -> Array | None:
        blocks = [
            _compare(
                units_of(target[site.path], group, site),
                units_of(leaves[site.path], group, site),
                across,
            )
            for site in group.sites
            if counts(group, site.path)
        ]
        return np.sum(blocks, axis=0) if blocks else None

    return similarity


def _first_pass(search: _Search) -> list[dict[str, Array]]:
    """Matches each group once, in program order, by weights whose other units are matched."""
    search = _started(search, search.permutations)
    # Towards a mean, the others follow parent 0 here: the mean of unmatched parents says nothing.
    fixed = search.reference if isinstance(search.reference, int) else 0
    for k, leaves in enumerate(search.leaves):
        known: set[str] = set()
        for group in search.symmetries.groups if k != fixed else ():
            similarity = _weight_similarity(search, search.leaves[fixed], leaves, known)
            step = _step(search.symmetries, group, similarity)
            _take(search, k, step, _moved(search, step, leaves))
            known |= step.keys()
    return search.permutations


def _descend(
    key: jax.Array, search: _Search, max_sweeps: int
) -> tuple[list[dict[str, Array]], tuple[float, ...]]:
    """Coordinate descent over the groups of all parents, in a new random order for each sweep."""
    visits = [(k, group) for k in _moving(search) for group in search.symmetries.groups]
    objective = [_objective(search)]
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    for _ in range(max_sweeps):
        moves = [_improve(search, *visits[i]) for i in rng.permutation(len(visits))]
        if not any(moves):
            break
        objective.append(_objective(search))
    return search.permutations, tuple(objective)


def _improve(search: _Search, k: int, group: Group) -> bool:
    """Moves one group of parent k, if that brings the parent closer to its target."""
    paths = [
        path
        for path, groups in search.at.items()
        if any(group.name in (one.name, one.within) for one in groups)
    ]
    target = _target(search, k, paths)
    before = {path: search.leaves[k][path] for path in paths}
    step = _step(search.symmetries, group, _weight_similarity(search, target, before))
    if all((p == np.arange(p.shape[-1])).all() for p in step.values()):
        return False
    after = _moved(search, step, before)
    # Where a leaf holds two of the groups that move, the assignment is for a linearised objective
    # and may lose.
    goal = {path: target[path] for path in after}
    gain = _inner(goal, after) - _inner(goal, before)
    if gain <= 1e-10 * math.sqrt(_inner(target, target) * _inner(before, before)):
        return False
    _take(search, k, step, after)
    return True


def _moved(search: _Search, step: Permutations, leaves: Leaves) -> Leaves:
    """The leaves that a step changes, as they are after it."""
    held = {path: leaves[path] for path in leaves if any(g.name in step for g in search.at[path])}
    return permute(search.symmetries, step, held)


def _take(search: _Search, k: int, step: Permutations, moved: Leaves) -> None:
    """Takes a step of parent k, which moves some of its leaves."""
    search.leaves[k].update(moved)
    whole = {**identity_permutations(search.symmetries), **step}
    search.permutations[k] = compose(search.symmetries, whole, search.permutations[k])


# Activation matching.


def activation_matching(
    symmetries: Symmetries,
    parents: Sequence[Any],
    apply_fn: ApplyFn,
    inputs: Any,
    reference: int = 0,
) -> tuple[list[dict[str, Array]], tuple[float, float]]:
    """Pairs the hidden units of each parent with those of a reference that act most alike.

    A unit's activations are read wherever a dot product or a convolution reads them; two units are
    alike as their correlation over examples and positions, summed over these places. Groups that
    nothing reads outside control flow keep their order.

    Args:
        symmetries: the symmetries.
        parents: K variable pytrees.
        apply_fn: the network.
        inputs: calibration inputs.
        reference: the number of the parent that the others are matched to.

    Returns:
        The permutations of each parent, and the sum of the correlations of paired units before and
        after.

    >>> from megajax.alignment.symmetries import find_symmetries
    >>> def mlp(variables, x):
    ...     return jnp.tanh(x @ variables["w"]) @ variables["v"]
    >>> parent = {"w": np.array([[1.0, 2.0]]), "v": np.array([[3.0], [4.0]])}
    >>> other = {"w": np.array([[2.0, 1.0]]), "v": np.array([[4.0], [3.0]])}
    >>> x = np.array([[-1.0], [0.5], [2.0]])
    >>> found = find_symmetries(mlp, parent, x)
    >>> activation_matching(found, [parent, other], mlp, x)[0][1]
    {'w': array([1, 0])}
    """
    network, groups = static(apply_fn), symmetries._replace(pinned=())
    placed = [identity_permutations(symmetries) for _ in parents]
    before = after = 0.0
    for k, parent in enumerate(parents):
        if k == reference:
            continue
        correlations = _correlate(network, groups, parents[reference], parent, inputs)
        blocks = {name: np.asarray(block, np.float64) for name, block in correlations.items()}
        for name, block in blocks.items():
            if not np.isfinite(block).all():
                raise DataError(
                    f"the activations of group {name!r} on the calibration inputs are not finite"
                )
        before += _paired(symmetries, blocks, placed[k])
        for group in symmetries.groups:
            if group.within is None:
                placed[k].update(_step(symmetries, group, partial(_given, blocks)))
        after += _paired(symmetries, blocks, placed[k])
    return placed, (before, after)


@partial(jax.jit, static_argnums=(0, 1))
def _correlate(
    apply_fn: ApplyFn, symmetries: Symmetries, a: Any, b: Any, inputs: Any
) -> dict[str, jax.Array]:
    """For each group the correlations of the units of two networks."""
    reading = read(trace(apply_fn, a, inputs))
    taps = _taps(symmetries, reading)
    total: dict[str, jax.Array] = {}
    pairs = zip(_hidden(reading, taps, a, inputs), _hidden(reading, taps, b, inputs), strict=True)
    for (group, x), (_, y) in pairs:
        block = _compare(_standardise(x), _standardise(y), group.within is not None)
        total[group.name] = total.get(group.name, 0) + block
    return total


def _given(blocks: Mapping[str, Array], group: Group, across: bool) -> Array | None:
    del across  # As the group needs it.
    return blocks.get(group.name)


def _standardise(units: jax.Array) -> jax.Array:
    """Rows of mean 0 and length 1, so that their inner products are correlations."""
    units = units.astype(jnp.float32)
    centred = units - units.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).sum(-1, keepdims=True) + 1e-12)


def _paired(symmetries: Symmetries, blocks: Mapping[str, Array], p: Permutations) -> float:
    """The sum of the similarities of the units that are paired."""
    total = 0.0
    for group in symmetries.groups:
        block = blocks.get(group.name)
        if block is None:
            continue
        if group.within is not None:
            block = block[np.arange(group.copies), p[group.within]]
        chosen = p[group.name].reshape(group.copies, group.size, 1)
        total += float(np.take_along_axis(block, chosen, -1).sum())
    return total


Taps = dict[int, list[tuple[int, Group, Site]]]


def _taps(symmetries: Symmetries, reading: Reading) -> Taps:
    """For every dot product and convolution, the operands that hold a group, and where."""
    by_path = dict(zip(reading.paths, reading.axes, strict=True))
    known: dict[Axis, tuple[Group, Axis | None]] = {}
    for group in symmetries.groups:
        unit, holder = _atoms_of(group, by_path[group.sites[0].path])
        if unit is not None:
            known[unit] = group, holder
    taps: Taps = {}
    for number, operands in reading.record.contracted.items():
        taps[number] = []
        for operand, axes in enumerate(operands):
            here = [(*known[place.unit], place) for place in places(axes) if place.unit in known]
            outer = {group.within for group, *_ in here}
            taps[number] += [
                (operand, group, site_at(axes, "", place, holder))
                for group, holder, place in here
                if group.name not in outer  # Its units count for what is within them.
            ]
    return taps


def _atoms_of(group: Group, axes: Axes) -> tuple[Axis | None, Axis | None]:
    """The atom that a group is in the trace, and the one that holds it; None if it is not one."""
    at = {(one.axis, one.offset, one.stride, one.unit.size): one.unit for one in places(axes)}
    site, copies = group.sites[0], group.sites[0].copies
    unit = at.get((site.axis, site.offset, site.stride, group.size))
    if copies is None:
        return unit, None
    offset = site.offset if copies.axis == site.axis else copies.offset
    holder = at.get((copies.axis, offset, copies.stride, group.copies))
    return (unit, holder) if holder is not None else (None, None)


def _hidden(
    reading: Reading, taps: Taps, variables: Any, inputs: Any
) -> list[tuple[Group, jax.Array]]:
    """Runs the network and reads the hidden units at the taps: [copies, size, samples]."""
    hidden: list[tuple[Group, jax.Array]] = []

    def visit(number: int, eqn: core.JaxprEqn, operands: Sequence[_Value]) -> list[_Value]:
        hidden.extend(
            (group, units_of(operands[place].array, group, site))
            for place, group, site in taps.get(number, ())
            if operands[place].active
        )
        active = any(operand.active for operand in operands)
        outputs = run_equation(eqn, [operand.array for operand in operands])
        return [_Value(output, active) for output in outputs]

    args = [_Value(leaf, False) for leaf in jax.tree.leaves(variables)]
    args += [_Value(leaf, True) for leaf in jax.tree.leaves(inputs)]
    walk(reading.program.closed, args, visit, lambda constant: _Value(constant, False))
    return hidden


class _Value(NamedTuple):
    """An array of a run, and whether it depends on the inputs."""

    array: Any
    active: bool
