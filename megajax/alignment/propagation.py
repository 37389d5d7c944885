"""How each primitive of a jaxpr ties the axes of its operands and results together.

`propagate` walks a jaxpr once and gives every value its axes (see `megajax.alignment.axes`). A rule
states which axes must be permuted alike for the primitive to commute with the permutation. A
primitive without a rule, or with parameters that its rule does not know, pins all that it touches
and is reported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from megajax.alignment.axes import Axis, atom, concat, pin, product, split, unify
from megajax.program.jaxprs import ELEMENTWISE, UNKNOWN_FORM, bodies, shape_of, size_of, walk

__all__ = ["RULES", "Axes", "Record", "fresh", "pin_all", "propagate"]

Axes = tuple[Axis | None, ...]
"""The axes of one value; None where the value is constant along the axis (or the size is 1)."""


@dataclasses.dataclass
class Record:
    """What a walk leaves behind.

    Attributes:
        values: the axes of every value that was met.
        contracted: for every dot product and convolution outside control flow, its number in a walk
            (see `megajax.program.jaxprs.walk`) and the axes of its operands.
        unknown: the names of the primitives that had no rule and touched an axis.
        first: for each argument that has axes, the number of the equation that first reads it.
    """

    values: list[Axes] = dataclasses.field(default_factory=list)
    contracted: dict[int, list[Axes]] = dataclasses.field(default_factory=dict)
    unknown: set[str] = dataclasses.field(default_factory=set)
    first: dict[int, int] = dataclasses.field(default_factory=dict)


Rule = Callable[[core.JaxprEqn, list[Axes], Record], list[Axes]]


def fresh(shape: Sequence[int], reason: str | None = None) -> Axes:
    """New atoms for the axes of an array.

    >>> [axis and axis.size for axis in fresh((1, 4))]
    [None, 4]
    """
    return tuple(None if size == 1 else atom(size, reason) for size in shape)


def pin_all(axes: Iterable[Axis | None], reason: str) -> None:
    """Pins every axis.

    >>> axes = fresh((2, 3))
    >>> pin_all(axes, "input")
    >>> [axis.reason for axis in axes]
    ['input', 'input']
    """
    for axis in axes:
        pin(axis, reason)


def propagate(
    closed: core.ClosedJaxpr, args: Sequence[Axes], record: Record, *, inside: bool = False
) -> list[Axes]:
    """Gives every value of a program its axes, tying together what its primitives tie.

    Args:
        closed: the program.
        args: the axes of its arguments.
        record: filled with what was met on the way.
        inside: it is the body of control flow, whose contractions are not recorded.

    Returns:
        The axes of its results.

    >>> closed = jax.make_jaxpr(lambda x, w: x @ w)(np.ones((2, 3)), np.ones((3, 4)))
    >>> (out,) = propagate(closed, [fresh((2, 3)), fresh((3, 4))], Record())
    >>> [axis.size for axis in out]
    [2, 4]
    """
    place = {} if inside else {id(axes): i for i, axes in enumerate(args) if axes}

    def visit(number: int, eqn: core.JaxprEqn, operands: Sequence[Axes]) -> Sequence[Axes]:
        note(operands, number)
        name, ranks = eqn.primitive.name, list(map(len, _shapes(eqn)))
        try:
            results = RULES.get(name, _unknown)(eqn, list(operands), record)
            known = list(map(len, results)) == ranks
        except UNKNOWN_FORM:
            known = False
        if not known:
            results = _unknown(eqn, list(operands), record)
        elif not inside and name in ("dot_general", "conv_general_dilated"):
            record.contracted[number] = list(operands)
        record.values.extend(results)
        return results

    def note(operands: Sequence[Axes], number: int) -> None:
        for axes in operands:
            if id(axes) in place:
                record.first.setdefault(place[id(axes)], number)

    def lift(value: Any) -> Axes:
        axes = _constant(value)
        record.values.append(axes)
        return axes

    record.values.extend(args)
    results = walk(closed, args, visit, lift)
    note(results, size_of(closed))
    return results


def _constant(value: Any) -> Axes:
    """The axes of a constant: free along an axis where it does not change, else pinned."""
    shape = np.shape(value)
    if not shape:
        return ()
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return fresh(shape, "constant")
    array = np.asarray(value)
    return tuple(
        None if n == 0 or np.all(array == array.take([0], axis)) else atom(n, "constant")
        for axis, n in enumerate(shape)
    )


def _shapes(eqn: core.JaxprEqn) -> list[tuple[int, ...]]:
    return [shape_of(x) for x in eqn.outvars]


def _unify_all(many: Iterable[Axes]) -> Axes:
    """Unifies values of one shape; scalars go with anything."""
    tied: Axes = ()
    for axes in many:
        tied = tuple(map(unify, tied, axes)) if tied and axes else tied or axes
    return tied


def _sizes(eqn: core.JaxprEqn, ins: list[Axes]) -> Iterator[tuple[Axis | None, int, int]]:
    """The axes of the first operand, with their sizes in it and in the first result."""
    return zip(ins[0], shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), strict=True)


def _pinned(axis: Axis | None, size: int, reason: str) -> Axis | None:
    """Pins `axis` and gives a pinned result axis in its stead."""
    pin(axis, reason)
    return None if size == 1 else atom(size, reason)


def _kept(eqn: core.JaxprEqn, axes: Axes, still: Sequence[bool]) -> list[Axes]:
    """Of a primitive that leaves some axes as they are: the others are pinned."""
    rows = zip(axes, shape_of(eqn.outvars[0]), still, strict=True)
    name = eqn.primitive.name
    return [tuple(axis if keep else _pinned(axis, n, name) for axis, n, keep in rows)]


def _unknown(eqn: core.JaxprEqn, ins: list[Axes], record: Record) -> list[Axes]:
    name = eqn.primitive.name
    if any(axis is not None for axes in ins for axis in axes):
        record.unknown.add(name)
    for axes in ins:
        pin_all(axes, name)
    return [fresh(shape, name) for shape in _shapes(eqn)]


# Rules for data that stays where it is.


def _elementwise(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    tied = _unify_all(ins)
    return [tied] * len(eqn.outvars)


def _each(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    return list(ins)


def _without(axes: Axes, gone: Collection[int]) -> list[Axes]:
    return [tuple(axis for i, axis in enumerate(axes) if i not in gone)]


def _reduce(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    return _without(ins[0], eqn.params["axes"])


def _locate(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    """For argmax and argmin: the result names positions, so the reduced axis is pinned."""
    for i in eqn.params["axes"]:
        pin(ins[0][i], eqn.primitive.name)
    return _reduce(eqn, ins)


def _ordered(*names: str) -> Rule:
    """Elementwise, but for the axes that the parameter names: there, order matters."""

    def rule(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
        tied = _unify_all(ins)
        along = next(eqn.params[name] for name in names if name in eqn.params)
        along = (along,) if isinstance(along, int) else tuple(along)
        still = [i not in along for i in range(len(tied))]
        return _kept(eqn, tied, still) * len(eqn.outvars)

    return rule


# Rules for data that changes its layout.


def _transpose(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    return [tuple(ins[0][i] for i in eqn.params["permutation"])]


def _squeeze(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    return _without(ins[0], [d % len(ins[0]) for d in eqn.params["dimensions"]])


def _broadcast_in_dim(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    out: list[Axis | None] = [None] * len(eqn.params["shape"])
    for axis, i in zip(ins[0], eqn.params["broadcast_dimensions"], strict=True):
        out[i] = axis
    return [tuple(out)]


def _reshape(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    old, new = shape_of(eqn.invars[0]), tuple(eqn.params["new_sizes"])
    axes = ins[0]
    if eqn.params.get("dimensions") is not None or 0 in old:
        pin_all(axes, "reshape")
        return [fresh(new, "reshape")]
    out: list[Axis | None] = [None] * len(new)
    for source, target in _blocks(old, new):
        if all(axes[i] is None for i in source):
            continue
        whole = product([axes[i] or atom(old[i]) for i in source])
        parts = split(whole, [new[i] for i in target])
        for i, part in zip(target, parts, strict=True):
            out[i] = part if new[i] != 1 else None
    return [tuple(out)]


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs the smallest runs of axes (without those of size 1) that hold the same entries."""
    left = [i for i, n in enumerate(old) if n != 1]
    right = [i for i, n in enumerate(new) if n != 1]
    while left and right:
        source, target = [left.pop(0)], [right.pop(0)]
        while (a := math.prod(old[i] for i in source)) != (b := math.prod(new[i] for i in target)):
            if a < b:
                source.append(left.pop(0))
            else:
                target.append(right.pop(0))
        yield source, target


def _concatenate(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    d = eqn.params["dimension"]
    segments = [axes[d] or atom(shape_of(x)[d]) for axes, x in zip(ins, eqn.invars, strict=True)]
    tied = list(_unify_all((*axes[:d], None, *axes[d + 1 :]) for axes in ins))
    tied[d] = concat(segments)
    return [tuple(tied)]


def _stack(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    d = eqn.params["axis"]
    tied = _unify_all(ins)
    (new,) = fresh((len(ins),), "stack")
    return [(*tied[:d], new, *tied[d:])]


def _unstack(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    d = eqn.params["axis"]
    pin(ins[0][d], "unstack")
    return _without(ins[0], [d]) * len(eqn.outvars)


def _split(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    d, sizes = eqn.params["axis"], eqn.params["sizes"]
    axis = ins[0][d]
    parts = [None] * len(sizes) if axis is None else split(axis, sizes, "concat")
    return [(*ins[0][:d], part, *ins[0][d + 1 :]) for part in parts]


def _pad(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    out = []
    rows = zip(_sizes(eqn, ins), eqn.params["padding_config"], strict=True)
    for (axis, n, new), (low, high, between) in rows:
        if low == high == between == 0:
            out.append(axis)
        elif low >= 0 and high >= 0 and between == 0:
            out.append(concat([atom(low), axis or atom(n), atom(high)]))
        else:
            out.append(_pinned(axis, new, "pad"))
    return [tuple(out)]


def _slice(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    out = []
    strides = eqn.params["strides"] or (1,) * len(ins[0])
    rows = zip(_sizes(eqn, ins), eqn.params["start_indices"], strides, strict=True)
    for (axis, n, new), start, stride in rows:
        if axis is None or n == new:
            out.append(axis)
        elif stride == 1:
            part = split(axis, (start, new, n - start - new), "concat")[1]
            out.append(part if new != 1 else None)
        else:
            out.append(_pinned(axis, new, "slice"))
    return [tuple(out)]


def _dynamic_slice(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    still = [axis is None or n == new for axis, n, new in _sizes(eqn, ins)]
    return _kept(eqn, ins[0], still)


def _dynamic_update_slice(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    out = []
    shapes = zip(ins[0], ins[1], shape_of(eqn.invars[0]), shape_of(eqn.invars[1]), strict=True)
    for axis, update, n, m in shapes:
        if n == m:
            out.append(unify(axis, update))
        else:
            pin(update, "dynamic_update_slice")
            out.append(_pinned(axis, n, "dynamic_update_slice"))
    return [tuple(out)]


def _tile(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    return [
        tuple(
            axis if axis is None or times == 1 else product([atom(times), axis])
            for axis, times in zip(ins[0], eqn.params["reps"], strict=True)
        )
    ]


def _gather(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    """Indexed axes are pinned; axes taken whole go through, as do those of the indices."""
    operand, indices = ins
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = shape_of(eqn.invars[0])
    pin(indices[-1], "gather")
    batch = list(indices[:-1])
    for i, j in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        batch[j] = unify(operand[i], batch[j])
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = []
    for i, axis in enumerate(operand):
        indexed = i in numbers.start_index_map or sizes[i] != shape[i]
        if i in numbers.collapsed_slice_dims:
            pin(axis, "gather")
        elif i not in gone:
            window.append(_pinned(axis, sizes[i], "gather") if indexed else axis)
    rank = len(batch) + len(window)
    offsets, rest = iter(window), iter(batch)
    return [tuple(next(offsets if i in numbers.offset_dims else rest) for i in range(rank))]


# Rules for sums of products and windows.


def _dot_general(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = ins
    for i, j in zip(left_sum, right_sum, strict=True):
        unify(left[i], right[j])
    batch = tuple(unify(left[i], right[j]) for i, j in zip(left_batch, right_batch, strict=True))
    (rows,) = _without(left, (*left_sum, *left_batch))
    (columns,) = _without(right, (*right_sum, *right_batch))
    return [(*batch, *rows, *columns)]


def _conv_general_dilated(eqn: core.JaxprEqn, ins: list[Axes], record: Record) -> list[Axes]:
    p = eqn.params
    if p["batch_group_count"] != 1:
        return _unknown(eqn, ins, record)
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    image, kernel = ins
    (image_shape, kernel_shape), (shape,) = (shape_of(x) for x in eqn.invars), _shapes(eqn)
    batch, channels, *space = numbers.lhs_spec
    outputs, inputs, *window = numbers.rhs_spec
    out: list[Axis | None] = [None] * len(shape)

    features = kernel[outputs]
    if groups == 1:
        unify(image[channels], kernel[inputs])
    else:
        sizes = (groups, kernel_shape[inputs])
        # A constant image has no axes of its own, but the sums over it differ between groups.
        grouped = split(image[channels] or atom(image_shape[channels]), sizes)
        unify(grouped[1] if sizes[1] != 1 else None, kernel[inputs])
        features = features or atom(kernel_shape[outputs])
        unify(split(features, (groups, kernel_shape[outputs] // groups))[0], grouped[0])
    out[numbers.out_spec[0]] = image[batch]
    out[numbers.out_spec[1]] = features

    dilation = zip(p["lhs_dilation"], p["window_strides"], p["padding"], strict=True)
    for i, j, k, still in zip(space, window, numbers.out_spec[2:], dilation, strict=True):
        pointwise = kernel_shape[j] == 1 and still == (1, 1, (0, 0))
        pin(kernel[j], "convolution window")
        out[k] = image[i] if pointwise else _pinned(image[i], shape[k], "convolution window")
    return [tuple(out)]


def _reduce_window(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation")
    windows = zip(*(eqn.params[name] for name in names), strict=True)
    return [
        tuple(
            axis if window == (1, 1, (0, 0), 1) else _pinned(axis, new, "pooling window")
            for (axis, _, new), window in zip(_sizes(eqn, ins), windows, strict=True)
        )
    ]


# Rules for programs inside programs.


def _cond(eqn: core.JaxprEqn, ins: list[Axes], record: Record) -> list[Axes]:
    results = [propagate(branch.closed, ins[1:], record, inside=True) for branch in bodies(eqn)]
    return [_unify_all(alike) for alike in zip(*results, strict=True)]


def _carried(inits: Sequence[Axes], atoms: Sequence[Any]) -> list[Axes]:
    """The axes of a loop's carry: a value constant at the start may change inside."""
    pairs = zip(inits, map(fresh, map(shape_of, atoms)), strict=True)
    return [tuple(a or b for a, b in zip(init, new, strict=True)) for init, new in pairs]


def _scan(eqn: core.JaxprEqn, ins: list[Axes], record: Record) -> list[Axes]:
    (body,) = bodies(eqn)
    last = len(ins) - body.sliced
    first = last - body.carried
    carry = _carried(ins[first:last], eqn.invars[first:last])
    length = eqn.params["length"]
    # With a carry the steps come one after another; without, they are alike.
    step = atom(length, "loop order" if carry else None)
    for axes in ins[last:]:
        unify(axes[0], step if axes[0] is not None else None)
    held = Record(unknown=record.unknown)
    args = [*ins[:first], *carry, *(axes[1:] for axes in ins[last:])]
    results = propagate(body.closed, args, held, inside=True)
    # What a step holds is one entry of what the loop holds.
    record.values.extend((*axes, step) for axes in held.values)
    after = [_unify_all(pair) for pair in zip(carry, results[: len(carry)], strict=True)]
    time = None if length == 1 else step
    return [*after, *((time, *axes) for axes in results[len(carry) :])]


def _while(eqn: core.JaxprEqn, ins: list[Axes], record: Record) -> list[Axes]:
    ask, body = bodies(eqn)
    last = len(ins) - body.carried
    carry = _carried(ins[last:], eqn.invars[last:])
    placed = [*ins[:last], *carry]
    propagate(ask.closed, [placed[i] for i in ask.operands], record, inside=True)
    results = propagate(body.closed, [placed[i] for i in body.operands], record, inside=True)
    return [_unify_all(pair) for pair in zip(carry, results, strict=True)]


def _iota(eqn: core.JaxprEqn, ins: list[Axes], *_: Any) -> list[Axes]:
    (shape,), along = _shapes(eqn), eqn.params["dimension"]
    return [tuple(_pinned(None, n, "iota") if i == along else None for i, n in enumerate(shape))]


_EACH = ("device_put", "optimization_barrier")
_REDUCTIONS = [f"reduce_{name}" for name in ("and", "max", "min", "or", "prod", "sum", "xor")]
_ORDERED = ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "rev", "sort")
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(_EACH, _each),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_ORDERED, _ordered("axis", "dimension", "dimensions")),
    **dict.fromkeys(_WINDOWS, _reduce_window),
    "argmax": _locate,
    "argmin": _locate,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "cond": _cond,
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "scan": _scan,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
    "while": _while,
}
