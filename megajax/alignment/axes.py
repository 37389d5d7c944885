"""Axes as terms, and their unification.

An axis of an array is described by how a permutation of hidden units may act on it:

- an *atom* of n units, to be permuted freely: all its entries are alike;
- a *product* of axes, outermost first: what `reshape` makes of several axes, or finds inside one;
- a *concatenation* of axes: what `concatenate` makes, or `slice` finds inside one.

Two axes that an operation ties together must be permuted alike, so they are unified: an atom takes
the form of the other axis, two forms are refined until they match. An axis whose order matters is
pinned, and so are two forms that have no common refinement: never wrong, at worst too strict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["Axis", "Box", "atom", "boxes", "concat", "find", "pin", "product", "split", "unify"]


class Axis:
    """A node of the term graph; compare two of them by `find(a) is find(b)`.

    Attributes:
        size: number of entries along the axis.
        link: the axis that this one was unified with, if any.
        kind: "atom", "product" or "concat".
        parts: the factors (outermost first) or the segments; empty for an atom.
        reason: why an atom is pinned; None while it is free.
    """

    __slots__ = ("kind", "link", "parts", "reason", "size")

    def __init__(self, size: int, kind: str = "atom", parts: tuple[Axis, ...] = ()):
        self.size = size
        self.link: Axis | None = None
        self.kind = kind
        self.parts = parts
        self.reason: str | None = None


def atom(size: int, reason: str | None = None) -> Axis:
    """A new atom of `size` units, pinned if a reason is given.

    >>> atom(8).kind
    'atom'
    """
    axis = Axis(size)
    axis.reason = reason
    return axis


def product(factors: Sequence[Axis]) -> Axis:
    """The axis that flattening `factors` (outermost first) gives; a single factor is itself.

    >>> product([atom(3), atom(4)]).size
    12
    """
    factors = [f for f in factors if f.size != 1] or list(factors[:1])
    if len(factors) == 1:
        return factors[0]
    return Axis(math.prod(f.size for f in factors), "product", tuple(factors))


def concat(segments: Sequence[Axis]) -> Axis:
    """The axis that lays `segments` end to end; a single segment is itself.

    >>> concat([atom(3), atom(4)]).size
    7
    """
    segments = [s for s in segments if s.size != 0]
    if len(segments) == 1:
        return segments[0]
    return Axis(sum(s.size for s in segments), "concat", tuple(segments))


def find(axis: Axis) -> Axis:
    """The representative of everything that `axis` was unified with.

    >>> a, b = atom(2), atom(2)
    >>> _ = unify(a, b)
    >>> find(a) is find(b)
    True
    """
    root = axis
    while root.link is not None:
        root = root.link
    while axis.link is not None:
        axis.link, axis = root, axis.link
    return root


def pin(axis: Axis | None, reason: str) -> None:
    """Pins every atom of `axis`; the first reason stays.

    >>> a = atom(4)
    >>> pin(a, "output")
    >>> a.reason
    'output'
    """
    for leaf in () if axis is None else _atoms(axis):
        leaf.reason = leaf.reason or reason


def unify(a: Axis | None, b: Axis | None) -> Axis | None:
    """Ties two axes of one size together and returns what both are now.

    None stands for an axis along which the array is constant: any permutation leaves it alone, so
    it takes no part.

    >>> flat = atom(12)
    >>> rows, columns = atom(3), atom(4)
    >>> _ = unify(flat, product([rows, columns]))
    >>> [part.size for part in find(flat).parts]
    [3, 4]
    """
    if a is None or b is None:
        return b if a is None else a
    a, b = find(a), find(b)
    if a is b:
        return a
    if a.kind == "atom":
        _bind(a, b)
        return b
    if b.kind == "atom":
        _bind(b, a)
        return a
    if not _match(a, b, a.kind if a.kind == b.kind else "concat"):
        pin(a, "no common refinement")
        pin(b, "no common refinement")
    a, b = find(a), find(b)
    if a is not b:
        a.link = b
    return b


def split(axis: Axis, sizes: Sequence[int], kind: str = "product") -> list[Axis]:
    """Finds factors (or, for kind "concat", segments) of the given sizes inside `axis`.

    >>> groups, units = split(atom(12), (3, 4))
    >>> groups.size, units.size
    (3, 4)
    """
    parts = [atom(size) for size in sizes]
    unify(axis, product(parts) if kind == "product" else concat(parts))
    return parts


Box = tuple[int, tuple[tuple[Axis, int], ...]]


def boxes(axis: Axis | None) -> list[Box]:
    """The axis as disjoint boxes `(offset, ((atom, stride), ...))`, factors outermost first.

    The box holds the entries `offset + sum(unit * stride)` over all units of its atoms. None, an
    axis along which the array is constant, has no box.

    >>> [(offset, [stride for _, stride in factors])
    ...  for offset, factors in boxes(concat([atom(5), product([atom(3), atom(4)])]))]
    [(0, [1]), (5, [4, 1])]
    """
    if axis is None:
        return []
    axis = find(axis)
    if axis.kind == "atom":
        return [(0, ((axis, 1),))]
    if axis.kind == "concat":
        out: list[Box] = []
        offset = 0
        for part in axis.parts:
            out.extend((offset + start, factors) for start, factors in boxes(part))
            offset += part.size
        return out
    out = [(0, ())]
    for part in axis.parts:
        inner = boxes(part)
        out = [
            (start * part.size + shift, (*((a, s * part.size) for a, s in factors), *more))
            for start, factors in out
            for shift, more in inner
        ]
    return out


def _atoms(axis: Axis) -> Iterable[Axis]:
    axis = find(axis)
    if axis.kind == "atom":
        yield axis
    for part in axis.parts:
        yield from _atoms(part)


def _bind(a: Axis, b: Axis) -> None:
    """Gives the atom `a` the form of `b`."""
    if a.reason is not None:
        pin(b, a.reason)
    a.link = b


def _next(stack: list[Axis], kind: str) -> Axis:
    """Takes the next part from the stack, opening parts that are themselves of that kind."""
    part = find(stack.pop())
    while part.kind == kind:
        stack.extend(part.parts if kind == "product" else reversed(part.parts))
        part = find(stack.pop())
    return part


def _match(a: Axis, b: Axis, kind: str) -> bool:
    """Unifies two axes part by part, dividing the larger part.

    Products go from the innermost factor outwards, concatenations from the first segment on.
    """
    left, right = [a], [b]
    while left and right:
        x, y = _next(left, kind), _next(right, kind)
        if x.size == y.size:
            unify(x, y)
            continue
        large, small, rest = (x, y, left) if x.size > y.size else (y, x, right)
        parts = (_factor if kind == "product" else _cut)(large, small.size)
        if parts is None:
            return False
        near, far = parts
        rest.append(far)
        unify(near, small)
    return True


def _refine(axis: Axis, kind: str, parts: tuple[Axis, Axis]) -> tuple[Axis, Axis]:
    """Replaces the form of `axis` by an equivalent one."""
    if axis.kind == "atom" and axis.reason is not None:
        for part in parts:
            part.reason = axis.reason
    axis.kind, axis.parts = kind, parts
    return parts


def _factor(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    """Finds (inner, outer) in an atom or a concatenation; None if it has no such form."""
    if any(part.size % size for part in axis.parts or (axis,)):
        return None
    inner, outer = atom(size), atom(axis.size // size)
    if axis.kind == "concat":
        segments = [atom(part.size // size) for part in axis.parts]
        for part, segment in zip(axis.parts, segments, strict=True):
            unify(part, product([segment, inner]))
        outer = concat(segments)
    _refine(axis, "product", (outer, inner))
    return inner, outer


def _cut(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    """Cuts an atom or a product after `size` entries; None if that would cut a factor's unit."""
    if axis.kind == "atom":
        return _refine(axis, "concat", (atom(size), atom(axis.size - size)))
    outer, *factors = axis.parts
    inner = product(factors)
    if size % inner.size:
        return None
    first, second = split(outer, (size // inner.size, (axis.size - size) // inner.size), "concat")
    return _refine(axis, "concat", (product([first, inner]), product([second, inner])))
