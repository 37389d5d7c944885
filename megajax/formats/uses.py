"""What a network's program does with each leaf, and so what its leaves are in another library.

The order of the layers, the role of a leaf (kernel, scale, bias, statistic, embedding) and the axes
of a kernel are all read off the program, as in `megajax.program.roles`: names and
containers play no part. The roles are given the names that PyTorch has for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from megajax.formats.layouts import Layout, as_is, conv, linear, vector
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
    used = sorted((role.first, number) for number, role in enumerate(roles) if role.first >= 0)
    leaves = [_leaf(number, roles[number], shapes[number]) for _, number in used]
    return [_slots(module) for module in _modules(leaves)]


class _Leaf(NamedTuple):
    """A leaf, and what is done with it first.

    Attributes:
        number: of the leaf, in flattening order.
        kind: as in `megajax.program.roles.Role`; `other` for a kernel of no PyTorch layer.
        shape: of the leaf.
        flattened: of the activations that it acts on.
        layout: where the kind says it, by itself.
    """

    number: int
    kind: str
    shape: tuple[int, ...]
    flattened: tuple[int, ...]
    layout: Layout | None = None


def _leaf(number: int, role: Role, shape: tuple[int, ...]) -> _Leaf:
    leaf = _Leaf(number, role.kind, shape, role.flattened)
    if role.kind == "kernel":
        first = next(one for one in role.contractions if one.number == role.first)
        layout = _layout(first, shape, role.flattened)
        leaf = leaf._replace(layout=layout, kind="kernel" if layout else "other")
    if leaf.kind in ("embedding", "other"):
        leaf = leaf._replace(layout=as_is(shape))
    return leaf


def _layout(one: Contraction, shape: tuple[int, ...], flattened: tuple[int, ...]) -> Layout | None:
    """How PyTorch would store the kernel of a contraction; None if it has no such layer."""
    numbers = one.equation.params["dimension_numbers"]
    if one.equation.primitive.name == "dot_general":
        contracting, batch = numbers
        if batch[0] or None in one.axes:
            return None
        pairs = sorted(zip(contracting[1 - one.operand], contracting[one.operand], strict=True))
        summed = [axis for _, dim in pairs if (axis := one.axes[dim]) is not None]
        return linear(shape, summed, flattened)
    transposed = any(step != 1 for step in one.equation.params["lhs_dilation"])
    places = [axis for dim in numbers.rhs_spec if (axis := one.axes[dim]) is not None]
    grouped = one.equation.params["batch_group_count"] != 1
    if one.operand != 1 or transposed or grouped or len(places) < len(one.axes):
        return None
    return conv(shape, places)


def _modules(leaves: Sequence[_Leaf]) -> list[list[_Leaf]]:
    """Cuts the leaves, in the order of their use, where a module ends."""
    modules: list[list[_Leaf]] = []
    for leaf in leaves:
        if modules and _belongs(leaf, modules[-1]):
            modules[-1].append(leaf)
        else:
            modules.append([leaf])
    return modules


_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
_TENSORS = {"kernel": "weight", "embedding": "weight", **_NORM}


def _belongs(leaf: _Leaf, module: Sequence[_Leaf]) -> bool:
    """Whether a leaf is one more tensor of a module that has some."""
    first, kinds, size = module[0], {other.kind for other in module}, math.prod(leaf.shape)
    if leaf.kind == "bias" and first.layout and kinds == {"kernel"}:
        return size == first.layout.source[0]
    norm = {*_NORM} >= {leaf.kind, *kinds} and kinds != {"bias"}  # which would stand by itself
    return norm and leaf.kind not in kinds and size == math.prod(first.shape)


def _slots(module: Sequence[_Leaf]) -> tuple[Slot, ...]:
    """The tensors of a module; those of a normalisation are flattened as its activations are."""
    norm = module[0].kind != "kernel"
    flattened = next((leaf.flattened for leaf in module if norm and leaf.flattened), ())
    return tuple(
        Slot(leaf.number, _TENSORS.get(leaf.kind), leaf.layout or vector(leaf.shape, flattened))
        for leaf in module
    )
