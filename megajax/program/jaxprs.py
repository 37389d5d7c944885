"""Traced programs: walked equation by equation, or run with somebody stepping in.

Knows jaxprs and nothing of what networks are made of; `layers` and `normalization` read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core

from megajax.types import ApplyFn, PyTree

__all__ = [
    "CALLS",
    "Delayed",
    "Program",
    "body_of",
    "delay",
    "known",
    "moved_axes",
    "run_equation",
    "shape_of",
    "trace",
    "walk",
]

CALLS = frozenset(
    {
        "call",
        "checkpoint",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "jit",
        "pjit",
        "remat2",
    }
)
"""Primitives that do what a program of theirs does, once and on their own operands."""

Delayed: TypeAlias = Callable[[], Any]
"""A value that is computed when it is asked for."""


class Program(NamedTuple):
    """A traced network.

    Attributes:
        closed: the program; its arguments are the variables' leaves, then the inputs'.
        shapes: shapes and dtypes of the variables' leaves.
        treedef: structure of the variables.
    """

    closed: core.ClosedJaxpr
    shapes: list[Any]
    treedef: Any


def trace(apply_fn: ApplyFn, variables: PyTree, inputs: Any) -> Program:
    """Traces a network without running it.

    Args:
        apply_fn: `apply_fn(variables, inputs) -> logits`.
        variables: of one network, or their shapes and dtypes.
        inputs: a batch of inputs, or its shape and dtype.

    Returns:
        The program.

    Example:
        >>> import numpy as np
        >>> len(trace(lambda w, x: x @ w, np.ones((3, 2)), np.ones((1, 3))).closed.eqns)
        1
    """
    shapes, treedef = jax.tree.flatten(jax.eval_shape(lambda tree: tree, variables))

    def flat_apply(flat: Sequence[jax.Array], inputs: Any) -> jax.Array:
        return apply_fn(jax.tree.unflatten(treedef, flat), inputs)

    return Program(jax.make_jaxpr(flat_apply)(shapes, inputs), shapes, treedef)


def walk(
    closed: core.ClosedJaxpr,
    arguments: Sequence[Any],
    visit: Callable[[int, core.JaxprEqn, Sequence[Any]], Sequence[Any]],
    lift: Callable[[Any], Any],
    numbers: Iterator[int] | None = None,
) -> list[Any]:
    """Visits the equations in the order of execution, those inside calls too.

    What a value is, is up to the visitor: a description, a delayed array, anything.

    Args:
        closed: the program.
        arguments: values of its arguments.
        visit: `visit(number, equation, operands)` returns the values of the outputs; the number
            counts the visits, and is the same in every walk.
        lift: makes a value from a constant.
        numbers: continues a walk, inside a call.

    Returns:
        The values of the program's results.

    Example:
        >>> import numpy as np
        >>> program = trace(lambda w, x: jax.jit(jax.numpy.sin)(x @ w), np.ones((3, 2)), np.ones(3))
        >>> def visit(number, equation, operands):
        ...     print(number, equation.primitive.name)
        ...     return [None]
        >>> walk(program.closed, [None, None], visit, lambda constant: None)
        0 dot_general
        1 sin
        [None]
    """
    numbers = itertools.count() if numbers is None else numbers
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(lift, closed.consts), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return lift(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        outputs: Sequence[Any]
        if equation.primitive.name in CALLS:
            outputs = walk(body_of(equation), operands, visit, lift, numbers)
        else:
            outputs = visit(next(numbers), equation, operands)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def delay(equation: core.JaxprEqn, operands: Sequence[Delayed]) -> list[Delayed]:
    """The outputs of an equation, computed at the first use of one of them.

    Args:
        equation: any equation.
        operands: its operands.

    Returns:
        Its outputs.

    Example:
        >>> equation = jax.make_jaxpr(lambda x: 2 * x)(1.0).eqns[0]
        >>> literal, argument = lambda: 2.0, lambda: jax.numpy.float32(3.0)
        >>> float(delay(equation, [literal, argument])[0]())
        6.0
    """
    computed: list[Any] = []

    def output(index: int) -> Any:
        if not computed:
            computed.extend(run_equation(equation, [operand() for operand in operands]))
        return computed[index]

    return [partial(output, i) for i in range(len(equation.outvars))]


def known(value: Any) -> Delayed:
    """A value that is there already.

    Example:
        >>> known(1)()
        1
    """
    return lambda: value


def run_equation(equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Does what an equation says.

    Args:
        equation: any equation.
        operands: arrays, one for each of its operands.

    Returns:
        Its outputs.

    Example:
        >>> equation = jax.make_jaxpr(lambda x: 2 * x)(1.0).eqns[0]
        >>> float(run_equation(equation, [2.0, jax.numpy.float32(3.0)])[0])
        6.0
    """
    pairs = zip(equation.invars, operands, strict=True)
    values = {atom: value for atom, value in pairs if not isinstance(atom, core.Literal)}
    names = core.DebugInfo("equation", equation.primitive.name, None, None)
    alone = core.Jaxpr((), list(values), equation.outvars, [equation], equation.effects, names)
    outputs: list[Any] = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*values.values())
    return outputs


def body_of(equation: core.JaxprEqn) -> core.ClosedJaxpr:
    """The program that a call does.

    Args:
        equation: of one of the `CALLS`.

    Returns:
        Its program.

    Example:
        >>> equation = jax.make_jaxpr(jax.jit(lambda x: 2 * x))(1.0).eqns[0]
        >>> len(body_of(equation).eqns)
        1
    """
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    body = next(equation.params[name] for name in names if name in equation.params)
    return body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())


def moved_axes(
    equation: core.JaxprEqn, axes: Sequence[int | None]
) -> tuple[int | None, ...] | None:
    """Follows the axes of an array through an equation that changes no more than layout or type.

    Args:
        equation: any equation.
        axes: for each dimension of its first operand which axis it is; None for one of no interest.

    Returns:
        The same for each dimension of its result; None for an axis that was added. None in all if
        the equation does more than add and drop axes of length one, move axes, broadcast or
        convert.

    Example:
        >>> import numpy as np
        >>> equation = jax.make_jaxpr(lambda x: x.T)(np.ones((2, 3))).eqns[0]
        >>> moved_axes(equation, (0, 1))
        (1, 0)
    """
    name = equation.primitive.name
    if name in ("convert_element_type", "copy", "copy_p"):
        return tuple(axes)
    if name == "transpose":
        return tuple(axes[dim] for dim in equation.params["permutation"])
    shape = shape_of(equation.outvars[0])
    if name == "broadcast_in_dim":
        places = dict(zip(equation.params["broadcast_dimensions"], axes, strict=True))
        return tuple(places.get(dim) for dim in range(len(shape)))
    if name in ("reshape", "squeeze", "expand_dims"):
        before = shape_of(equation.invars[0])
        if [n for n in before if n != 1] == [n for n in shape if n != 1]:
            kept = iter([axis for axis, n in zip(axes, before, strict=True) if n != 1])
            return tuple(next(kept) if n != 1 else None for n in shape)
    return None


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of an equation's operand or output.

    Example:
        >>> import numpy as np
        >>> shape_of(jax.make_jaxpr(lambda x: x + x)(np.ones((2, 3))).eqns[0].outvars[0])
        (2, 3)
    """
    shape: tuple[int, ...] = atom.aval.shape
    return shape
