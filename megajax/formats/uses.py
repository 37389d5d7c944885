"""What a network's program does with each leaf, and so what its leaves are in another library.

The order of the layers, the role of a leaf (kernel, scale, bias, statistic, embedding) and the axes
of a kernel are all read off the program, as in `megajax.program.roles`: names and
containers play no part. The roles are given the names that PyTorch has for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from megajax.formats import layouts
from megajax.formats.layouts import Layout
from megajax.program.jaxprs import trace
from megajax.program.roles import Contraction, Role, find_roles
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
    shapes = [tuple(spec.shape) for spec in trace(apply_fn, variables, inputs).shapes]
    roles = find_roles(apply_fn, variables, inputs).leaves
    uses = {leaf: _use(role, shapes[leaf]) for leaf, role in enumerate(roles) if role.first >= 0}
    ordered = sorted(uses, key=lambda leaf: (roles[leaf].first, leaf))
    return [_slots(group, uses, shapes) for group in _groups(ordered, uses, shapes)]


class _Use(NamedTuple):
    """What is done with a leaf first.

    Attributes:
        kind: as in `megajax.program.roles.Role`.
        layout: of a kernel.
        flattened: of the activations that it acts on.
        units: of a kernel's output, in all.
    """

    kind: str
    layout: Layout | None
    flattened: tuple[int, ...]
    units: int = 0


def _use(role: Role, shape: tuple[int, ...]) -> _Use:
    if role.kind == "embedding":
        return _Use(role.kind, layouts.as_is(shape), role.flattened)
    if role.kind != "kernel":
        return _Use(role.kind, None, role.flattened)
    first = next(one for one in role.contractions if one.number == role.first)
    layout = _layout(first, shape, role.flattened)
    if layout is None:
        return _Use("other", None, role.flattened)
    return _Use(role.kind, layout, role.flattened, layout.source[0])


def _layout(one: Contraction, shape: tuple[int, ...], flattened: tuple[int, ...]) -> Layout | None:
    """How PyTorch would store the kernel of a contraction; None if it has no such layer."""
    numbers = one.equation.params["dimension_numbers"]
    if one.equation.primitive.name == "dot_general":
        contracting, batch = numbers
        if batch[0] or None in one.axes:
            return None
        pairs = sorted(zip(contracting[1 - one.operand], contracting[one.operand], strict=True))
        summed = [axis for _, dim in pairs if (axis := one.axes[dim]) is not None]
        return layouts.linear(shape, summed, flattened)
    transposed = any(step != 1 for step in one.equation.params["lhs_dilation"])
    places = [axis for dim in numbers.rhs_spec if (axis := one.axes[dim]) is not None]
    grouped = one.equation.params["batch_group_count"] != 1
    if one.operand != 1 or transposed or grouped or len(places) < len(one.axes):
        return None
    return layouts.conv(shape, places)


def _groups(
    ordered: Sequence[int], uses: dict[int, _Use], shapes: Sequence[tuple[int, ...]]
) -> list[list[int]]:
    """Cuts the leaves, in the order of their use, where a module ends."""
    groups: list[list[int]] = []
    for leaf in ordered:
        use = uses[leaf]
        group = groups[-1] if groups else []
        roles = {uses[other].kind for other in group}
        size = math.prod(shapes[leaf])
        if use.kind == "bias" and roles == {"kernel"}:
            joins = size == uses[group[0]].units
        elif use.kind in ("scale", "bias", "mean", "variance"):
            norm = roles and roles <= {"scale", "bias", "mean", "variance"}
            alone = roles == {"bias"}  # a bias by itself is no normalisation
            joins = bool(norm) and not alone and use.kind not in roles
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
    if uses[group[0]].kind != "kernel":
        flattened = next((uses[leaf].flattened for leaf in group if uses[leaf].flattened), ())
    slots = []
    for leaf in group:
        use = uses[leaf]
        layout = use.layout
        if layout is None and use.kind == "other":
            layout = layouts.as_is(shapes[leaf])
        elif layout is None:
            layout = layouts.vector(shapes[leaf], flattened)
        slots.append(Slot(leaf, _TENSORS.get(use.kind), layout))
    return tuple(slots)
