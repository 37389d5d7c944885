"""What a network's program does with each leaf, and so what its leaves are in another library.

The order of the layers, the role of a leaf (kernel, scale, bias, statistic, embedding) and the axes
of a kernel are all read off the program, as in `layers` and `normalization`: names and containers
play no part. The roles are given the names that PyTorch has for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core

from megajax.formats import layouts
from megajax.formats.layouts import Layout
from megajax.program.jaxprs import moved_axes, shape_of, trace, walk
from megajax.program.roles import find_statistics
from megajax.types import ApplyFn, PyTree

__all__ = ["Slot", "find_modules"]


class Slot(NamedTuple):
    """A leaf, and the tensor of a PyTorch module that it would be.

    Attributes:
        leaf: index of the leaf, in flattening order.
        tensor: `weight`, `bias`, `running_mean` or `running_var`; None for a leaf that is used in
            another way.
        layout: that tensor's layout.
    """

    leaf: int
    tensor: str | None
    layout: Layout


def find_modules(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> list[tuple[Slot, ...]]:
    """Groups the leaves into what would be PyTorch's modules, in the order of the program.

    A contraction's kernel begins a module, and so does the first leaf of a normalisation; a bias
    that follows belongs to it.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs `[b, ...]`, or its shape and dtype; images have channels last.

    Returns:
        The modules. Leaves that the program does not use are in none.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply_fn(w, x):
        ...     return jnp.tanh(x @ w["a"] + w["b"]) @ w["c"]
        >>> w = {"a": jnp.ones((4, 8)), "b": jnp.ones(8), "c": jnp.ones((8, 2))}
        >>> for module in find_modules(apply_fn, w, jnp.ones((1, 4))):
        ...     print([(slot.leaf, slot.tensor, slot.layout.source) for slot in module])
        [(0, 'weight', (8, 4)), (1, 'bias', (8,))]
        [(2, 'weight', (2, 8))]
    """
    program = trace(apply_fn, variables, inputs)
    shapes = [tuple(spec.shape) for spec in program.shapes]
    uses: dict[int, _Use] = {}

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[_Value]) -> list[_Value]:
        for leaf, use in _uses_in(equation, operands, shapes, number).items():
            uses.setdefault(leaf, use)
        return [_output(equation, operands)] * len(equation.outvars)

    arguments = [
        _Value(view=(i, tuple(range(len(shape)))), leaves=frozenset({i}))
        for i, shape in enumerate(shapes)
    ]
    arguments += [_Value(active=True, spatial=len(x.shape) >= 4) for x in jax.tree.leaves(inputs)]
    walk(program.closed, arguments, visit, lambda constant: _Value())
    for statistic in find_statistics(apply_fn, variables, inputs):
        for leaf, role in ((statistic.mean, "mean"), (statistic.variance, "variance")):
            if leaf in uses:
                uses[leaf] = uses[leaf]._replace(role=role)
    ordered = sorted(uses, key=lambda leaf: (uses[leaf].number, leaf))
    return [_slots(group, uses, shapes) for group in _groups(ordered, uses, shapes)]


View: TypeAlias = tuple[int, tuple[int | None, ...]]


class _Value(NamedTuple):
    """What is known of an intermediate.

    Attributes:
        view: the leaf that it is, and the leaf's axis at each of its axes (None: a new one).
        leaves: the leaves that it was made of, if the inputs played no part.
        active: the inputs played a part.
        spatial: it is `[batch, *spatial, channels]`.
        flattened: `(*spatial, channels)`, if its last axis was flattened from there.
    """

    view: View | None = None
    leaves: frozenset[int] = frozenset()
    active: bool = False
    spatial: bool = False
    flattened: tuple[int, ...] = ()


class _Use(NamedTuple):
    """The first thing that is done with a leaf.

    Attributes:
        number: of the equation.
        role: `kernel`, `embedding`, `scale`, `bias`, `mean`, `variance` or `other`.
        layout: of a kernel.
        flattened: of the activations that it acts on.
        units: of a kernel's output, in all.
    """

    number: int
    role: str
    layout: Layout | None = None
    flattened: tuple[int, ...] = ()
    units: int = 0


_ELEMENTWISE = {"add": "bias", "add_any": "bias", "mul": "scale"}
_SPATIAL = frozenset(
    {
        "reduce_window",
        "reduce_window_max",
        "reduce_window_min",
        "reduce_window_sum",
        "pad",
        "slice",
        "concatenate",
    }
)


def _uses_in(
    equation: core.JaxprEqn,
    operands: Sequence[_Value],
    shapes: Sequence[tuple[int, ...]],
    number: int,
) -> dict[int, _Use]:
    """The uses of leaves in one equation: where a leaf meets activations or another leaf."""
    name = equation.primitive.name
    involved = [value for value in operands if value.active or value.leaves]
    if len(involved) < 2:
        return {}
    flattened = next((value.flattened for value in operands if value.active), ())
    uses = {}
    for position, value in enumerate(operands):
        role = "other"
        layout, units = None, 0
        if value.view is not None:
            leaf, axes = value.view
            active = any(other.active for other in operands)
            if name == "conv_general_dilated" and position == 1 and active:
                layout = _of_convolution(equation, axes, shapes[leaf])
            elif name == "dot_general" and active:
                layout = _of_product(equation, position, axes, shapes[leaf], flattened)
            elif name == "gather" and position == 0 and active:
                role, layout = "embedding", layouts.as_is(shapes[leaf])
            elif name in _ELEMENTWISE:
                role = _ELEMENTWISE[name]
            if layout is not None and role == "other":
                role, units = "kernel", layout.source[0]
        for leaf in value.leaves:
            if not value.active:
                uses[leaf] = _Use(number, role, layout, flattened, units)
    return uses


def _of_convolution(
    equation: core.JaxprEqn, axes: Sequence[int | None], shape: tuple[int, ...]
) -> Layout | None:
    parameters = equation.params
    transposed = any(step != 1 for step in parameters["lhs_dilation"])
    places = [axes[place] for place in parameters["dimension_numbers"].rhs_spec]
    if transposed or parameters["batch_group_count"] != 1 or None in places:
        return None
    return layouts.conv(shape, [place for place in places if place is not None])


def _of_product(
    equation: core.JaxprEqn,
    position: int,
    axes: Sequence[int | None],
    shape: tuple[int, ...],
    flattened: tuple[int, ...],
) -> Layout | None:
    contracting, batch = equation.params["dimension_numbers"]
    if batch[0] or None in axes:
        return None
    pairs = sorted(zip(contracting[1 - position], contracting[position], strict=True))
    contracted = [axes[of_leaf] for _, of_leaf in pairs]
    return layouts.linear(shape, [axis for axis in contracted if axis is not None], flattened)


def _output(equation: core.JaxprEqn, operands: Sequence[_Value]) -> _Value:
    """What is known of an equation's result."""
    name, shape = equation.primitive.name, shape_of(equation.outvars[0])
    active = [(v, atom) for v, atom in zip(operands, equation.invars, strict=True) if v.active]
    if not active:
        leaves = frozenset().union(*(value.leaves for value in operands))
        view = _viewed(equation, operands[0].view) if len(leaves) == 1 and operands else None
        return _Value(view=view, leaves=leaves)
    value, atom = active[0]
    before = shape_of(atom)
    if name == "conv_general_dilated":
        dimensions = equation.params["dimension_numbers"].out_spec
        return _Value(active=True, spatial=dimensions[1] == len(shape) - 1)
    if name == "dot_general" or name == "transpose":
        return _Value(active=True)
    if name == "reshape" and value.spatial and len(shape) == 2 and shape[0] == before[0]:
        return _Value(active=True, flattened=before[1:])
    same = all(shape_of(other) in (shape, ()) for _, other in active)
    if same or (name in _SPATIAL and len(before) == len(shape)):
        spatial = any(other.spatial for other, _ in active)
        flat = next((other.flattened for other, _ in active if other.flattened), ())
        return _Value(active=True, spatial=spatial, flattened=flat if same else ())
    return _Value(active=True)


def _viewed(equation: core.JaxprEqn, view: View | None) -> View | None:
    """A leaf with its axes renamed, if the equation does no more than that."""
    axes = None if view is None else moved_axes(equation, view[1])
    return None if view is None or axes is None else (view[0], axes)


def _groups(
    ordered: Sequence[int], uses: dict[int, _Use], shapes: Sequence[tuple[int, ...]]
) -> list[list[int]]:
    """Cuts the leaves, in the order of their use, where a module ends."""
    groups: list[list[int]] = []
    for leaf in ordered:
        use = uses[leaf]
        group = groups[-1] if groups else []
        roles = {uses[other].role for other in group}
        size = math.prod(shapes[leaf])
        if use.role == "bias" and roles == {"kernel"}:
            joins = size == uses[group[0]].units
        elif use.role in ("scale", "bias", "mean", "variance"):
            norm = roles and roles <= {"scale", "bias", "mean", "variance"}
            alone = roles == {"bias"}  # a bias by itself is no normalisation
            joins = bool(norm) and not alone and use.role not in roles
            joins = joins and size == math.prod(shapes[group[0]])
        else:
            joins = False
        if joins:
            group.append(leaf)
        else:
            groups.append([leaf])
    return groups


_TENSORS = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "variance": "running_var",
}


def _slots(
    group: Sequence[int], uses: dict[int, _Use], shapes: Sequence[tuple[int, ...]]
) -> tuple[Slot, ...]:
    flattened: tuple[int, ...] = ()
    if uses[group[0]].role != "kernel":
        flattened = next((uses[leaf].flattened for leaf in group if uses[leaf].flattened), ())
    slots = []
    for leaf in group:
        use = uses[leaf]
        layout = use.layout
        if layout is None and use.role == "other":
            layout = layouts.as_is(shapes[leaf])
        elif layout is None:
            layout = layouts.vector(shapes[leaf], flattened)
        slots.append(Slot(leaf, _TENSORS.get(use.role), layout))
    return tuple(slots)
