"""Restores the statistics of activations in a merged network, from its inference program alone.

A mixed network's activations shrink and drift away from what its BatchNorm layers recorded in the
parents; with statistics measured anew the same weights work again (REPAIR, arXiv 2211.08403). The
layers are found in the program: a leaf is a mean if it is subtracted from activations that are then
divided by the root of another leaf, the variance. So no training mode, name or framework is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from megajax.errors import ConfigError
from megajax.program.jaxprs import Delayed, Program, delay, known, moved_axes, shape_of, trace, walk
from megajax.types import ApplyFn, PyTree

__all__ = [
    "Linear",
    "Statistic",
    "find_linear",
    "find_statistics",
    "recalibrate",
    "repair",
]


class Statistic(NamedTuple):
    """A BatchNorm layer: where its statistics are, and where the program uses them.

    Attributes:
        mean: index of the mean's leaf, in flattening order.
        variance: index of the variance's leaf.
        equation: which equation subtracts the mean, in the order of execution.
        axes: the activations' axes that are averaged over.
    """

    mean: int
    variance: int
    equation: int
    axes: tuple[int, ...]


class Linear(NamedTuple):
    """A dense layer or convolution with a bias, whose outputs are hidden units.

    Attributes:
        kernel: index of the kernel's leaf, in flattening order.
        kernel_axis: the kernel's axis of output units.
        bias: index of the bias's leaf, `[units]`.
        equation: which equation adds the bias, in the order of execution.
        axis: the activations' axis of units.
    """

    kernel: int
    kernel_axis: int
    bias: int
    equation: int
    axis: int


def find_statistics(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> tuple[Statistic, ...]:
    """Finds the BatchNorm layers of a network in its inference program.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs `[b, ...]`, or its shape and dtype.

    Returns:
        The layers, in the order in which the program uses them; none inside loops.

    Example:
        >>> def apply_fn(w, x):
        ...     return (x - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        >>> w = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
        >>> find_statistics(apply_fn, w, jnp.ones((8, 3)))
        (Statistic(mean=0, variance=1, equation=1, axes=(0,)),)
    """
    program = trace(apply_fn, variables, inputs)
    found: list[Statistic] = []

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[_Trait]) -> Sequence[_Trait]:
        trait = _follow(number, equation, operands)
        if trait.root is not None and trait.centred is not None:
            found.append(trait.centred._replace(variance=trait.root))
            trait = _Trait()
        return [trait] * len(equation.outvars)

    walk(program.closed, _traits(program, inputs), visit, lambda constant: _Trait(weight=True))
    return tuple(found)


def recalibrate(apply_fn: ApplyFn, variables: PyTree, inputs: jax.Array) -> PyTree:
    """Gives every BatchNorm layer the exact mean and variance of its activations on `inputs`.

    Layer by layer in the order of the program, each one behind layers that are corrected already:
    what a forward pass in training mode would normalise with, without its moving average. May be
    jitted and vmapped, so that every candidate of a population can be scored as it will be used.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of one network.
        inputs: calibration inputs `[n, ...]`, all in one batch; a few hundred do.

    Returns:
        The variables with new statistics; all other leaves are the same.

    Raises:
        ConfigError: the network has no BatchNorm statistics.

    Example:
        >>> def apply_fn(w, x):
        ...     return (x - w["mean"]) * jax.lax.rsqrt(w["var"] + 1e-5)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> w = recalibrate(apply_fn, {"mean": jnp.zeros(1), "var": jnp.ones(1)}, x)
        >>> float(w["mean"][0]), float(w["var"][0])
        (2.0, 1.0)

    Source: Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
    arXiv 2211.08403, section on resetting BatchNorm.
    """
    statistics = {s.equation: s for s in find_statistics(apply_fn, variables, inputs)}
    if not statistics:
        raise ConfigError(
            "recalibrate: the network has no BatchNorm statistics (a leaf that is subtracted from "
            "activations, which are then divided by the root of another)"
        )
    leaves = jax.tree.leaves(variables)

    def step_in(
        number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]
    ) -> Sequence[Delayed]:
        statistic = statistics.get(number)
        if statistic is not None:
            x = operands[0]().astype(jnp.float32)
            _set(leaves, statistic.mean, jnp.mean(x, statistic.axes))
            _set(leaves, statistic.variance, jnp.var(x, statistic.axes))
        return delay(equation, operands)

    _run(trace(apply_fn, variables, inputs), leaves, inputs, step_in)
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def find_linear(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> tuple[Linear, ...]:
    """Finds the layers with kernel and bias whose pre-activations can be rescaled exactly.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs `[b, ...]`, or its shape and dtype.

    Returns:
        The layers in the order of the program, but the last, whose outputs are the logits; none
        inside loops, and none whose kernel is used twice.

    Example:
        >>> def apply_fn(w, x):
        ...     return jnp.tanh(x @ w["u"] + w["b"]) @ w["v"]
        >>> w = {"u": jnp.ones((2, 3)), "b": jnp.ones(3), "v": jnp.ones((3, 1))}
        >>> find_linear(apply_fn, w, jnp.ones((4, 2)))
        (Linear(kernel=1, kernel_axis=1, bias=0, equation=2, axis=1),)
    """
    program = trace(apply_fn, variables, inputs)
    found: list[Linear] = []
    used: list[int] = []
    contractions: list[int] = []

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[_Trait]) -> Sequence[_Trait]:
        trait = _follow(number, equation, operands)
        if trait.weight:
            trait = trait._replace(leaves=frozenset().union(*(one.leaves for one in operands)))
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            contractions.append(number)
            used.extend(leaf for operand in operands for leaf in operand.leaves)
            trait = trait._replace(linear=_linear(number, equation, operands))
        elif equation.primitive.name in ("add", "add_any") and len(operands) == 2:
            for one, other in (operands, operands[::-1]):
                linear = one.linear
                if linear is not None and other.leaf is not None and other.dims == (linear.axis,):
                    found.append(linear._replace(bias=other.leaf, equation=number))
        return [trait] * len(equation.outvars)

    walk(program.closed, _traits(program, inputs), visit, lambda constant: _Trait(weight=True))
    last = max(contractions, default=-1)
    return tuple(
        layer for layer in found if used.count(layer.kernel) == 1 and layer.equation < last
    )


def repair(
    apply_fn: ApplyFn,
    variables: PyTree,
    parents: Sequence[PyTree],
    inputs: jax.Array,
    weights: Sequence[float] | None = None,
) -> PyTree:
    """Gives every hidden unit of a merged network the parents' mean and spread (REPAIR).

    For networks without BatchNorm. Layer by layer in the order of the program, kernel and bias of
    each unit are rescaled so that its pre-activations on `inputs` have the weighted mean of the
    parents' means, and of their standard deviations.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`, in inference mode.
        variables: of the merged network.
        parents: the K networks it was merged from, hidden units aligned.
        inputs: calibration inputs `[n, ...]`, all in one batch.
        weights: `[K]`, how much each parent counts; None counts them alike.

    Returns:
        The variables with rescaled kernels and biases. A unit that is constant stays as it is.

    Raises:
        ConfigError: no layer has a kernel and a bias that hidden units come from.

    Example:
        >>> def apply_fn(w, x):
        ...     return jnp.tanh(x @ w["u"] + w["b"]) @ w["v"]
        >>> w = {"u": jnp.ones((1, 1)), "b": jnp.zeros(1), "v": jnp.ones((1, 1))}
        >>> shrunk = w | {"u": w["u"] / 4}
        >>> x = jnp.array([[1.0], [-1.0]])
        >>> round(float(repair(apply_fn, shrunk, [w, w], x)["u"][0, 0]), 3)
        1.0

    Source: Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
    arXiv 2211.08403.
    """
    layers = {layer.equation: layer for layer in find_linear(apply_fn, variables, inputs)}
    if not layers:
        raise ConfigError("repair: no hidden layer of the network has a kernel and a bias")
    program = trace(apply_fn, variables, inputs)

    def moments(z: jax.Array, axis: int) -> jax.Array:
        others = tuple(i for i in range(z.ndim) if i != axis)
        return jnp.stack([jnp.mean(z, others), jnp.std(z, others)])

    def measured(variables: PyTree) -> dict[int, jax.Array]:
        moments_of: dict[int, jax.Array] = {}

        def look(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
            outputs = delay(equation, operands)
            if number in layers:
                moments_of[number] = moments(outputs[0](), layers[number].axis)
            return outputs

        _run(program, jax.tree.leaves(variables), inputs, look)
        return moments_of

    of_parents = [measured(parent) for parent in parents]
    share = jnp.full(len(parents), 1 / len(parents)) if weights is None else jnp.asarray(weights)
    target = {
        number: jnp.tensordot(share, jnp.stack([m[number] for m in of_parents]), 1)
        for number in layers
    }
    leaves = jax.tree.leaves(variables)

    def step_in(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
        outputs = delay(equation, operands)
        if number not in layers:
            return outputs
        layer, z = layers[number], outputs[0]()
        (mean, spread), (new_mean, new_spread) = moments(z, layer.axis), target[number]
        scale = jnp.where(spread > 1e-6, new_spread / jnp.maximum(spread, 1e-6), 1.0)
        shift = jnp.where(spread > 1e-6, new_mean - scale * mean, 0.0)
        kernel, bias = leaves[layer.kernel], leaves[layer.bias]
        _set(leaves, layer.kernel, kernel * _along(scale, layer.kernel_axis, kernel.ndim))
        _set(leaves, layer.bias, bias * scale.reshape(bias.shape) + shift.reshape(bias.shape))
        repaired = z * _along(scale, layer.axis, z.ndim) + _along(shift, layer.axis, z.ndim)
        return [known(repaired)]

    _run(program, leaves, inputs, step_in)
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def _along(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _linear(number: int, equation: core.JaxprEqn, operands: Sequence[_Trait]) -> Linear | None:
    """A contraction of activations with one leaf, its bias still unknown."""
    activations, kernel = operands[:2]
    if activations.weight or kernel.leaf is None or not kernel.weight:
        return None
    ndim = len(shape_of(equation.outvars[0]))
    if equation.primitive.name == "dot_general":
        (_, contracted), (_, batch) = equation.params["dimension_numbers"]
        free = [d for d in range(len(kernel.dims)) if d not in (*contracted, *batch)]
        place, axis = free[-1] if len(free) == 1 and not batch else -1, ndim - 1
    else:
        numbers = equation.params["dimension_numbers"]
        place, axis = numbers.rhs_spec[0], numbers.out_spec[1]
    if place not in kernel.dims:
        return None
    return Linear(kernel.leaf, kernel.dims.index(place), -1, number, axis)


def _run(
    program: Program,
    leaves: list[Any],
    inputs: Any,
    step_in: Callable[[int, core.JaxprEqn, Sequence[Delayed]], Sequence[Delayed]],
) -> None:
    """Runs a program on leaves that may change on the way: each is read when its value is used."""
    arguments: list[Delayed] = [partial(leaves.__getitem__, i) for i in range(len(leaves))]
    arguments += [known(leaf) for leaf in jax.tree.leaves(inputs)]
    for output in walk(program.closed, arguments, step_in, known):
        output()


def _set(leaves: list[Any], index: int, value: jax.Array) -> None:
    leaves[index] = value.reshape(leaves[index].shape).astype(leaves[index].dtype)


class _Trait(NamedTuple):
    """What is known of an intermediate without computing it.

    Attributes:
        weight: derived from leaves and constants only.
        leaf: it is this leaf, reshaped or broadcast; `dims` are the axes where the leaf's are.
        dims: see `leaf`.
        root: a factor or divisor that is the root of this leaf.
        centred: activations from which a mean was just subtracted.
        linear: what a contraction just computed, before its bias is added.
        leaves: all leaves that a weight was computed from, however.
    """

    weight: bool = False
    leaf: int | None = None
    dims: tuple[int, ...] = ()
    root: int | None = None
    centred: Statistic | None = None
    linear: Linear | None = None
    leaves: frozenset[int] = frozenset()


def _traits(program: Program, inputs: Any) -> list[_Trait]:
    """The traits of a program's arguments."""
    leaves = [
        _Trait(weight=True, leaf=i, dims=tuple(range(len(shape.shape))), leaves=frozenset({i}))
        for i, shape in enumerate(program.shapes)
    ]
    return [*leaves, *(_Trait() for _ in jax.tree.leaves(inputs))]


def _follow(number: int, equation: core.JaxprEqn, operands: Sequence[_Trait]) -> _Trait:
    """The trait of an equation's output."""
    name, ndim = equation.primitive.name, len(shape_of(equation.outvars[0]))
    first, *others = operands or [_Trait(weight=True)]
    second = others[0] if others else _Trait(weight=True)
    if all(operand.weight for operand in operands):
        if name in ("reshape", "broadcast_in_dim", "convert_element_type", "squeeze", "copy"):
            dims = _moved(equation, first.dims) if first.leaf is not None else None
            return first._replace(leaf=first.leaf if dims else None, dims=dims or ())
        if name in ("rsqrt", "sqrt", "pow", "integer_pow"):
            return _Trait(weight=True, root=first.leaf)
        if name == "add" and (first.leaf is None) != (second.leaf is None):  # variance + epsilon
            return first if first.leaf is not None else second
        if name in ("mul", "div"):
            return _Trait(weight=True, root=first.root if first.root is not None else second.root)
        return _Trait(weight=True)
    if name == "sub" and not first.weight and second.leaf is not None:
        axes = tuple(axis for axis in range(ndim) if axis not in second.dims)
        return _Trait(centred=Statistic(second.leaf, -1, number, axes))
    if name in ("mul", "div"):
        centred = first.centred if first.centred is not None else second.centred
        root = first.root if first.root is not None else second.root
        return _Trait(centred=centred, root=root if centred is not None else None)
    if name == "convert_element_type":
        return first
    return _Trait()


def _moved(equation: core.JaxprEqn, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where a leaf's axes are after an equation; None if one of them is gone."""
    rank = len(shape_of(equation.invars[0]))
    axes = moved_axes(equation, [dims.index(d) if d in dims else None for d in range(rank)])
    if axes is None or any(axis not in axes for axis in range(len(dims))):
        return None
    return tuple(axes.index(axis) for axis in range(len(dims)))
