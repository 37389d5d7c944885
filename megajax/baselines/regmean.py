"""RegMean: the linear layers whose outputs are nearest to the parents' on the parents' own inputs.

The layers are found in the program: a kernel is a leaf that the program uses for nothing but
contractions with activations (matrix products of any number of axes, convolutions of any stride,
padding, dilation and grouping). Leaves that are none (biases, norms, embeddings, kernels inside
loops or used in two ways) are averaged, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from megajax.baselines.averages import uniform_average
from megajax.baselines.given import Given, Result, baseline
from megajax.baselines.leaves import is_floating
from megajax.errors import ConfigError, DataError, ParentsError
from megajax.program.jaxprs import Delayed, delay, run, shape_of, static, trace
from megajax.program.roles import Contraction, Role, find_roles
from megajax.trees import leaves_by_path
from megajax.types import ApplyFn, Key, PyTree

__all__ = ["Kernel", "check_inputs", "find_kernels", "gram_matrices", "regmean"]

_RIDGE = 1e-6


class Kernel(NamedTuple):
    """A leaf that is the kernel of a linear layer.

    As a matrix it is `[groups, inputs, outputs of a group]`; the inputs of a convolution are the
    window's: channels, then positions.

    Attributes:
        leaf: its index, in flattening order.
        order: its axes, those of inputs before those of outputs.
        inputs: numbers that one output of the layer is made of.
        groups: of a grouped convolution; 1 for any other layer.
        uses: for each contraction with it, the equation's number in the order of execution and
            which operand the activations are.
    """

    leaf: int
    order: tuple[int, ...]
    inputs: int
    groups: int
    uses: tuple[tuple[int, int], ...]


def find_kernels(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> tuple[Kernel, ...]:
    """Finds the kernels of a network's linear layers in its program, which is not run.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs `[b, ...]`, or its shape and dtype.

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
    roles = find_roles(apply_fn, variables, inputs).leaves
    made = (_kernel(leaf, *one) for leaf, one in enumerate(zip(roles, shapes, strict=True)))
    found = [kernel for kernel in made if kernel is not None]
    return tuple(sorted(found, key=lambda kernel: kernel.uses[0]))


def _kernel(leaf: int, role: Role, spec: Any) -> Kernel | None:
    """The kernel that a leaf is; None if it is none, or is used in two ways."""
    forms = {_form(one) for one in role.contractions}
    form = forms.pop() if len(forms) == 1 else None
    if form is None or role.elsewhere or not is_floating(spec):
        return None
    return Kernel(leaf, *form, tuple((one.number, 1 - one.operand) for one in role.contractions))


def _form(one: Contraction) -> tuple[tuple[int, ...], int, int] | None:
    """Order, inputs and groups of a kernel, as one contraction has it."""
    params, shape = one.equation.params, shape_of(one.equation.invars[one.operand])
    if one.equation.primitive.name == "dot_general":
        contracted, batch = (dims[one.operand] for dims in params["dimension_numbers"])
        if batch:
            return None
        inputs, groups = tuple(contracted), 1
        outputs = tuple(dim for dim in range(len(shape)) if dim not in inputs)
    else:
        if one.operand == 0 or params["batch_group_count"] != 1:
            return None
        output, *window = params["dimension_numbers"].rhs_spec
        inputs, outputs, groups = tuple(window), (output,), params["feature_group_count"]
    order = tuple(axis for dim in (*inputs, *outputs) if (axis := one.axes[dim]) is not None)
    return order, math.prod(shape[dim] for dim in inputs), groups


def gram_matrices(
    apply_fn: ApplyFn,
    variables: PyTree,
    inputs: Any,
    *,
    batch_size: int = 64,
) -> dict[int, np.ndarray]:
    """`X^T X` of what enters each linear layer of a network, summed over the inputs.

    Args:
        apply_fn: the network, in inference mode.
        variables: of one network.
        inputs: `[n, ...]`; a few hundred do.
        batch_size: the largest batch to run; the windows of a convolution exist for one batch at a
            time.

    Returns:
        For each kernel's leaf (see `find_kernels`) `[groups, inputs, inputs]` float64, of products
        in float32. A row of X is one example, one position of a sequence or one window of a
        convolution.

    Raises:
        DataError: there are no inputs, or they are not finite.

    Example:
        >>> gram_matrices(lambda w, x: x @ w, np.ones((2, 1)), np.array([[1.0, 2.0]]))[0].tolist()
        [[[1.0, 2.0], [2.0, 4.0]]]
    """
    count = check_inputs(inputs)
    total: dict[int, np.ndarray] = {}
    for rows in np.array_split(np.arange(count), -(-count // batch_size)):
        batch = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], inputs)
        for leaf, gram in _grams(static(apply_fn), variables, batch).items():
            total[leaf] = total.get(leaf, 0.0) + np.asarray(gram, np.float64)
    return total


def check_inputs(inputs: Any) -> int:
    """The number of calibration examples.

    Raises:
        DataError: there are none, or they are not finite.

    Example:
        >>> check_inputs(np.ones((3, 2)))
        3
    """
    for path, leaf in leaves_by_path(inputs).items():
        bad = np.size(leaf) - int(np.isfinite(np.asarray(leaf, np.float32)).sum())
        if bad:
            at = f"the calibration inputs {path}".strip()
            raise DataError(f"{at}: {bad} of {np.size(leaf)} values are not finite")
    count = min((len(leaf) for leaf in jax.tree.leaves(inputs)), default=0)
    if count == 0:
        raise DataError("the calibration inputs are empty")
    return count


def regmean(
    apply_fn: ApplyFn,
    parents: Sequence[PyTree],
    inputs: Any,
    *,
    alpha: float = 0.9,
    batch_size: int = 64,
) -> PyTree:
    """Merges linear layers in closed form, so that their outputs stay near the parents'.

    For each layer `W = (sum_k G_k)^-1 sum_k G_k W_k`, which minimises
    `sum_k |X_k W - X_k W_k|^2`; X_k is what enters the layer in parent k and `G_k = X_k^T X_k`, its
    off-diagonal scaled by `alpha`. Along directions in which no parent has any input (pixels that
    are always 0) W is the mean: each G_k gets a millionth of the mean trace on its diagonal. Layers
    are solved on the host in float64, all by themselves: no layer knows what others became.

    Args:
        apply_fn: the network, in inference mode.
        parents: K variable pytrees of one structure, hidden units aligned.
        inputs: `[n, ...]` (any pytree but a list), or a list of K: each parent's own training
            inputs.
        alpha: 1 for the exact solution, 0 to weigh every input by itself; the paper takes 0.9, and
            0.1 where 0.9 degenerates.
        batch_size: the largest batch to run.

    Returns:
        The merged network. Leaves that are no kernel are averaged, those that are not floating stay
        as in parent 0.

    Raises:
        ConfigError: alpha lies outside [0, 1], or the network has no linear layer.
        DataError: there are no inputs.
        ParentsError: there are not K lists of inputs, or the parents differ in structure.

    Example:
        >>> def apply_fn(w, x):
        ...     return x @ w
        >>> parents = [np.array([[1.0], [5.0]]), np.array([[7.0], [2.0]])]
        >>> inputs = [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])]  # each sees one input only
        >>> regmean(apply_fn, parents, inputs).round(3).tolist()
        [[1.0], [2.0]]

    Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR
    2023, arXiv 2212.09849.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}: it must lie between 0 and 1")
    merged = uniform_average(parents)  # checks their structure, too
    own = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs] * len(parents)
    if len(own) != len(parents):
        raise ParentsError(f"{len(own)} lists of inputs are given for {len(parents)} parents")
    first = jax.tree.map(lambda x: np.asarray(x)[:batch_size], own[0])
    kernels = find_kernels(apply_fn, parents[0], first)
    if not kernels:
        raise ConfigError("regmean: the program contracts no leaf with activations")
    grams = [
        gram_matrices(apply_fn, parent, data, batch_size=batch_size)
        for parent, data in zip(parents, own, strict=True)
    ]
    leaves, treedef = jax.tree.flatten(merged)
    of_parents = [jax.tree.leaves(parent) for parent in parents]
    for kernel in kernels:
        matrices = [
            _to_matrix(kernel, np.asarray(leaf[kernel.leaf], np.float64)) for leaf in of_parents
        ]
        weights = [gram[kernel.leaf] for gram in grams]
        old = leaves[kernel.leaf]
        solved = _from_matrix(kernel, _solve(matrices, weights, alpha), old.shape)
        leaves[kernel.leaf] = jnp.asarray(solved, old.dtype)
    return jax.tree.unflatten(treedef, leaves)


def _solve(matrices: Sequence[np.ndarray], grams: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """The layer `[g, d, o]` from the parents' and what enters them."""
    eye = np.eye(grams[0].shape[-1])
    scaled = [gram * (alpha + (1 - alpha) * eye) for gram in grams]
    trace = np.mean([np.trace(gram, axis1=1, axis2=2) for gram in grams], axis=0)
    ridge = _RIDGE * np.where(trace > 0, trace, 1.0)[:, None, None] * eye
    left = sum(gram + ridge for gram in scaled)
    right = sum((gram + ridge) @ matrix for gram, matrix in zip(scaled, matrices, strict=True))
    solution: np.ndarray = np.linalg.solve(left, right)
    return solution


@partial(jax.jit, static_argnums=0)
def _grams(apply_fn: ApplyFn, variables: PyTree, inputs: jax.Array) -> dict[int, jax.Array]:
    kernels = find_kernels(apply_fn, variables, inputs)
    uses = {number: (kernel, place) for kernel in kernels for number, place in kernel.uses}
    total: dict[int, jax.Array] = {}

    def look(
        number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]
    ) -> Sequence[Delayed]:
        if number in uses:
            kernel, place = uses[number]
            rows = _rows(kernel, equation, place, operands[place]().astype(jnp.float32))
            gram = jnp.einsum("ngi,ngj->gij", rows, rows, precision=jax.lax.Precision.HIGHEST)
            total[kernel.leaf] = total.get(kernel.leaf, 0.0) + gram
        return delay(equation, operands)

    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(variables)]
    run(trace(apply_fn, variables, inputs), leaves, inputs, look, uses)
    return total


def _rows(kernel: Kernel, equation: core.JaxprEqn, place: int, x: jax.Array) -> jax.Array:
    """What enters a layer, `[rows, groups, inputs]`."""
    params = equation.params
    if equation.primitive.name == "dot_general":
        contracted = params["dimension_numbers"][0][place]
        x = jnp.moveaxis(x, contracted, tuple(range(-len(contracted), 0)))
    else:
        numbers = params["dimension_numbers"]
        window = [shape_of(equation.invars[1])[d] for d in numbers.rhs_spec[2:]]
        x = jax.lax.conv_general_dilated_patches(
            x,
            window,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            numbers,
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jnp.moveaxis(x, numbers.out_spec[1], -1)
    return x.reshape(-1, kernel.groups, kernel.inputs)


def _to_matrix(kernel: Kernel, leaf: np.ndarray) -> np.ndarray:
    """`[groups, inputs, outputs of a group]`; axes of length one that are not in order drop out."""
    order = _full_order(kernel, leaf.ndim)
    flat = leaf.transpose(order).reshape(kernel.inputs, kernel.groups, -1)
    return np.moveaxis(flat, 1, 0)


def _from_matrix(kernel: Kernel, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    order = _full_order(kernel, len(shape))
    moved = np.moveaxis(matrix, 0, 1).reshape([shape[axis] for axis in order])
    leaf: np.ndarray = moved.transpose(np.argsort(order))
    return leaf


def _full_order(kernel: Kernel, ndim: int) -> tuple[int, ...]:
    return kernel.order + tuple(axis for axis in range(ndim) if axis not in kernel.order)


@baseline(
    "regmean",
    "linear layers nearest to the parents' outputs, in closed form",
    "Jin et al., arXiv 2212.09849",
    needs=("calibration",),
    default=True,
)
def _regmean(key: Key, given: Given) -> Result:
    assert given.inputs is not None
    return Result(given.prepared(regmean(given.apply_fn, given.parents, given.inputs)))
