"""Merging layer by layer: each kernel solves a least-squares problem of what enters its layer.

The layers are found in the program: a kernel is a leaf that the program uses for nothing but
contractions with activations (matrix products of any number of axes, convolutions of any stride,
padding, dilation and grouping, by their windows). Knows networks and examples; what is a good layer
is up to a rule, of which RegMean has one and PLeaS another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from megajax.baselines.averages import uniform_average
from megajax.baselines.leaves import is_floating
from megajax.entry import taken
from megajax.errors import ConfigError
from megajax.program.jaxprs import Delayed, delay, run, shape_of, static, trace
from megajax.program.roles import Contraction, Role, find_roles
from megajax.trees import checked_parents
from megajax.types import ApplyFn, PyTree

__all__ = ["Kernel", "Rule", "find_kernels", "merge_layers"]

Rule: TypeAlias = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]
"""`rule(rows, deviations, alpha) -> left, right`: the equations `left @ change = right` of a layer.

`rows` is what enters the layer in K networks, `[K, n, groups, inputs]`; `deviations` is by how much
their kernels differ from the mean, `[K, groups, inputs, outputs]`; `change` is what is added to the
mean. Both sides are sums over the rows.
"""


class Kernel(NamedTuple):
    """A leaf that is the kernel of a linear layer.

    As a matrix it is `[groups, inputs, outputs of a group]`; the inputs of a convolution are the
    window's: channels, then positions.

    Attributes:
        leaf: its index, in flattening order.
        order: its axes, those of inputs before those of outputs.
        inputs: numbers that one output of the layer is made of.
        groups: of a grouped convolution; 1 for any other layer.
        uses: the contractions with it.
        bias: index of the bias's leaf that is solved with it, as one more input that is always 1;
            -1 for none.
    """

    leaf: int
    order: tuple[int, ...]
    inputs: int
    groups: int
    uses: tuple[Contraction, ...]
    bias: int = -1

    def matrix(self, leaves: Sequence[Any]) -> np.ndarray:
        """The kernel and its bias, of a network's leaves."""
        leaf = np.asarray(leaves[self.leaf], np.float64)
        flat = leaf.transpose(self._axes(leaf.ndim)).reshape(self.inputs, self.groups, -1)
        matrix = np.moveaxis(flat, 1, 0)
        if self.bias < 0:
            return matrix
        bias = np.asarray(leaves[self.bias], np.float64).reshape(self.groups, 1, -1)
        return np.concatenate([matrix, bias], axis=1)

    def store(self, matrix: np.ndarray, leaves: list[Any]) -> None:
        """Puts such a matrix in the place of kernel and bias."""
        old = leaves[self.leaf]
        order = self._axes(old.ndim)
        moved = np.moveaxis(matrix[:, : self.inputs], 0, 1)
        new = moved.reshape([old.shape[axis] for axis in order]).transpose(np.argsort(order))
        leaves[self.leaf] = jnp.asarray(new, old.dtype)
        if self.bias >= 0:
            bias = leaves[self.bias]
            leaves[self.bias] = jnp.asarray(matrix[:, -1].reshape(bias.shape), bias.dtype)

    def rows(self, use: Contraction, x: jax.Array) -> jax.Array:
        """What enters the layer, `[rows, groups, inputs]`, from the activations."""
        x, equation = x.astype(jnp.float32), use.equation
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][1 - use.operand]
            x = jnp.moveaxis(x, contracted, tuple(range(-len(contracted), 0)))
        else:
            numbers, given = equation.params["dimension_numbers"], equation.params
            window = [shape_of(equation.invars[1])[dim] for dim in numbers.rhs_spec[2:]]
            x = jax.lax.conv_general_dilated_patches(
                x,
                window,
                given["window_strides"],
                given["padding"],
                given["lhs_dilation"],
                given["rhs_dilation"],
                numbers,
                precision=_EXACT,
            )
            x = jnp.moveaxis(x, numbers.out_spec[1], -1)
        x = x.reshape(-1, self.groups, self.inputs)
        return x if self.bias < 0 else jnp.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=1)

    def _axes(self, ndim: int) -> tuple[int, ...]:
        """All axes; those of length one that the program drops come last."""
        return self.order + tuple(axis for axis in range(ndim) if axis not in self.order)


def find_kernels(
    apply_fn: ApplyFn, variables: PyTree, inputs: Any, *, biases: bool = False
) -> tuple[Kernel, ...]:
    """Finds the kernels of a network's linear layers in its program, which is not run.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> outputs`, in inference mode.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs `[b, ...]`, or its shape and dtype.
        biases: whether the biases that are added to their outputs belong to them.

    Returns:
        The kernels, in the order in which the program first uses them. A leaf that several layers
        share is one kernel with several uses.

    Example:
        >>> def apply_fn(w, x):
        ...     return jnp.tanh(x @ w["u"] + w["b"]) @ w["v"]
        >>> w = {"b": jnp.ones(3), "u": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}
        >>> [(kernel.leaf, kernel.inputs) for kernel in find_kernels(apply_fn, w, jnp.ones((4, 2)))]
        [(1, 2), (2, 3)]
    """
    shapes = trace(apply_fn, variables, inputs).shapes
    roles = find_roles(apply_fn, variables, inputs)
    added = {one.kernel: one.bias for one in roles.biased} if biases else {}
    made = (
        _kernel(leaf, role, added.get(leaf, -1))
        for leaf, (role, spec) in enumerate(zip(roles.leaves, shapes, strict=True))
        if is_floating(spec)
    )
    found = [kernel for kernel in made if kernel is not None]
    return tuple(sorted(found, key=lambda kernel: kernel.uses[0].number))


def _kernel(leaf: int, role: Role, bias: int) -> Kernel | None:
    """The kernel that a leaf is; None if it is none, or is used in two ways."""
    forms = {_form(one) for one in role.contractions}
    form = forms.pop() if len(forms) == 1 and not role.elsewhere else None
    return None if form is None else Kernel(leaf, *form, role.contractions, bias)


def _form(use: Contraction) -> tuple[tuple[int, ...], int, int] | None:
    """Order, inputs and groups of a kernel, as one contraction has it."""
    params, shape = use.equation.params, shape_of(use.equation.invars[use.operand])
    if use.equation.primitive.name == "dot_general":
        contracted, batch = (dims[use.operand] for dims in params["dimension_numbers"])
        if batch:
            return None
        inputs, groups = tuple(contracted), 1
        outputs = tuple(dim for dim in range(len(shape)) if dim not in inputs)
    else:
        if use.operand == 0 or params["batch_group_count"] != 1:
            return None
        output, *window = params["dimension_numbers"].rhs_spec
        inputs, outputs, groups = tuple(window), (output,), params["feature_group_count"]
    order = tuple(axis for dim in (*inputs, *outputs) if (axis := use.axes[dim]) is not None)
    return order, math.prod(shape[dim] for dim in inputs), groups


def merge_layers(
    apply_fn: ApplyFn,
    rule: Rule,
    parents: Sequence[PyTree],
    sets: Sequence[tuple[Sequence[int], PyTree]],
    *,
    alpha: float = 1.0,
    ridge: float = 1e-6,
    biases: bool = False,
    in_turn: bool = False,
    batch_size: int = 64,
) -> PyTree:
    """Solves the layers of a network, in the order of the program.

    Args:
        apply_fn: the network, in inference mode.
        rule: what is a good layer.
        parents: K variable pytrees of one structure, hidden units aligned.
        sets: which parents see which inputs `[n, ...]`.
        alpha: for the rule.
        ridge: how much holds each layer at the mean, in parts of the trace of `left`.
        biases: whether biases are solved with their kernels.
        in_turn: what enters a layer is what the layers before it give that are merged already, in
            every parent's stead: a pass over all inputs for each layer. Otherwise it is what enters
            it in the parents, and no layer knows what others became.
        batch_size: the largest batch to run. The windows of a convolution exist for one batch.

    Returns:
        The merged network. Leaves that are no kernel are averaged, those that are not floating stay
        as in parent 0.

    Raises:
        ConfigError: the network has no linear layer.
        DataError: there are no inputs, or they are not finite.
        ParentsError: the parents differ in structure.
    """
    parents = checked_parents(parents)
    batches: list[tuple[list[int], PyTree]] = []
    for members, inputs in sets:
        taken(apply_fn, parents[members[0]], inputs, "calibration inputs")
        count = len(jax.tree.leaves(inputs)[0])
        for rows in np.array_split(np.arange(count), -(-count // batch_size)):
            batch = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], inputs)
            batches.append((list(members), batch))
    merged, treedef = jax.tree.flatten(uniform_average(parents))
    networks = [jax.tree.leaves(parent) for parent in parents]
    kernels = find_kernels(apply_fn, parents[0], batches[0][1], biases=biases)
    if not kernels:
        raise ConfigError("the program contracts no leaf with activations")
    uses = {use.number: 1 - use.operand for kernel in kernels for use in kernel.uses}
    for group in [[kernel] for kernel in kernels] if in_turn else [kernels]:
        now = jax.tree.unflatten(treedef, merged)
        matrices = [np.stack([kernel.matrix(leaves) for leaves in networks]) for kernel in group]
        sums: list[Any] = [(0.0, 0.0)] * len(group)
        for members, batch in batches:
            seen = [now] if in_turn else [parents[k] for k in members]
            entering = [_entering(static(apply_fn), tuple(uses.items()), n, batch) for n in seen]
            for i, (kernel, each) in enumerate(zip(group, matrices, strict=True)):
                own = [[one[use.number] for one in entering] for use in kernel.uses]
                deviations = np.float32(each[members] - each.mean(0))
                sides = _equations(rule, kernel, own, deviations, alpha)
                sums[i] = tuple(s + np.float64(x) for s, x in zip(sums[i], sides, strict=True))
        for kernel, each, (left, right) in zip(group, matrices, sums, strict=True):
            kernel.store(each.mean(0) + _solve(left, right, ridge), merged)
    return jax.tree.unflatten(treedef, merged)


@partial(jax.jit, static_argnums=(0, 1))
def _equations(
    rule: Rule, kernel: Kernel, entering: list[list[jax.Array]], deviations: Any, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Both sides of a layer's equations on one batch, from what enters it: use by network."""
    pairs = zip(kernel.uses, entering, strict=True)
    rows = [jnp.stack([kernel.rows(use, x) for x in networks]) for use, networks in pairs]
    return rule(jnp.concatenate(rows, axis=1), deviations, alpha)


@partial(jax.jit, static_argnums=(0, 1))
def _entering(
    apply_fn: ApplyFn, uses: tuple[tuple[int, int], ...], variables: PyTree, inputs: PyTree
) -> dict[int, jax.Array]:
    """An operand of some equations in one network: the activations there, by their numbers."""
    operand_of = dict(uses)
    found: dict[int, jax.Array] = {}

    def look(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
        if number in operand_of:
            found[number] = operands[operand_of[number]]()
        return delay(equation, operands)

    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(variables)]
    run(trace(apply_fn, variables, inputs), leaves, inputs, look, operand_of)
    return found


def _solve(left: np.ndarray, right: np.ndarray, ridge: float) -> np.ndarray:
    """The change of a layer `[groups, inputs, outputs]`, in float64."""
    trace = np.trace(left, axis1=1, axis2=2)
    held = ridge * np.where(trace > 0, trace, 1.0)[:, None, None] * np.eye(left.shape[-1])
    return np.linalg.solve(np.float64(left) + held, np.float64(right))


_EXACT = jax.lax.Precision.HIGHEST
product = partial(jnp.einsum, precision=_EXACT)
"""A product of arrays in full precision, for rules."""
