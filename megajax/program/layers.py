"""Which leaves form one layer, read off the program itself.

A layer begins where a leaf meets the activations in a contraction (matrix product, convolution,
look-up); the leaves that then act element by element on its output (bias, scale, statistics) belong
to it. Names and containers play no part, so that Linen, NNX, Haiku and plain JAX are all alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from megajax.program.jaxprs import trace
from megajax.types import ApplyFn, PyTree

__all__ = ["find_layers"]

_CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "gather", "ragged_dot"})


class _Value(NamedTuple):
    """What is known of an intermediate: which leaves it was made of, or which layer computed it.

    An activation has a layer (-1: the inputs, before any layer); anything else has `layer=None`
    and the indices of the leaves it derives from (none for a constant).
    """

    leaves: frozenset[int] = frozenset()
    layer: int | None = None


def find_layers(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> PyTree:
    """Numbers the layers of a network in the order in which its program uses them.

    The program is only traced, never run.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`.
        variables: one parent (arrays, or their shapes and dtypes).
        inputs: a batch of inputs `[b, ...]`, or its shape and dtype.

    Returns:
        A pytree like `variables` with the layer's number (int) at each leaf. A leaf that the
        program does not use is a layer of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply_fn(variables, x):
        ...     for w, b in variables:
        ...         x = jnp.tanh(x @ w + b)
        ...     return x
        >>> mlp = [(jnp.ones((4, 8)), jnp.ones(8)), (jnp.ones((8, 2)), jnp.ones(2))]
        >>> find_layers(apply_fn, mlp, jnp.ones((1, 4)))
        [(0, 0), (1, 1)]
    """
    program = trace(apply_fn, variables, inputs)
    count = len(program.shapes)
    arguments = [_Value(leaves=frozenset({i})) for i in range(count)]
    arguments += [_Value(layer=-1) for _ in jax.tree.leaves(inputs)]
    layer_of: dict[int, int] = {}
    _follow(program.closed.jaxpr, arguments, layer_of)
    unused = [i for i in range(count) if i not in layer_of]
    next_layer = max(layer_of.values(), default=-1) + 1
    layer_of.update({i: next_layer + n for n, i in enumerate(unused)})
    return jax.tree.unflatten(program.treedef, [layer_of[i] for i in range(count)])


def _follow(
    jaxpr: core.Jaxpr, arguments: Sequence[_Value], layer_of: dict[int, int]
) -> list[_Value]:
    """Walks the equations in order; returns the values of the outputs and fills `layer_of`."""
    values: dict[core.Var, _Value] = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> _Value:
        return _Value() if isinstance(atom, core.Literal) else values.get(atom, _Value())

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = _inner_jaxpr(equation, operands)
        if inner is not None:
            outputs = _follow(inner, operands[-len(inner.invars) :], layer_of)
        else:
            output = _combine(equation.primitive.name, operands, layer_of)
            outputs = [output] * len(equation.outvars)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inner_jaxpr(equation: core.JaxprEqn, operands: Sequence[_Value]) -> core.Jaxpr | None:
    """The body of a call, loop or branch whose last operands are the equation's own."""
    for name in ("jaxpr", "call_jaxpr", "body_jaxpr", "branches"):
        body = equation.params.get(name)
        if body is not None:
            body = body[-1] if name == "branches" else body
            body = getattr(body, "jaxpr", body)
            fits = len(body.invars) <= len(operands) and len(body.outvars) == len(equation.outvars)
            return body if fits else None
    return None


def _combine(name: str, operands: Sequence[_Value], layer_of: dict[int, int]) -> _Value:
    """The value that a primitive computes from its operands."""
    leaves = frozenset().union(*(value.leaves for value in operands))
    layers = [value.layer for value in operands if value.layer is not None]
    if not layers:
        return _Value(leaves=leaves)
    layer = max(layers)
    new = [i for i in sorted(leaves) if i not in layer_of]
    if new and (name in _CONTRACTIONS or layer < 0):
        layer = max(layer_of.values(), default=-1) + 1
    elif leaves and not new and name in _CONTRACTIONS:
        layer = max(layer_of[i] for i in leaves)  # a leaf used a second time (tied weights)
    layer_of.update(dict.fromkeys(new, layer))
    return _Value(layer=layer)
