"""What all individuals have in common is computed once for the population, not once for each.

Where the first layers are frozen, every network passes the examples through the same numbers. Knows
programs, and which leaves are an individual's own; nothing of masks, metrics or devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from megajax.program.jaxprs import Delayed, Program, delay, dependences, known, run, trace, walk
from megajax.types import ApplyFn, Genes, PyTree, bind

__all__ = ["Split", "own_leaves", "split"]


class Split(NamedTuple):
    """A network in two parts, which compare equal to those of an equal network.

    Attributes:
        first: `first(variables, inputs [b, ...]) -> features`, a list of arrays that depend on
            leaves that all individuals have in common, and on no other.
        rest: `rest(variables, (inputs, features)) -> outputs`.
    """

    first: Callable[[PyTree, Any], list[jax.Array]]
    rest: ApplyFn


def own_leaves(
    express: Callable[[Genes, PyTree], PyTree], genes: Genes, context: PyTree
) -> list[bool]:
    """Which leaves of a network depend on its genes, seen from the program that expresses them.

    Args:
        express: `express(genes_of_one, context) -> variables`.
        genes: of one individual, or their shapes and dtypes.
        context: the parents and what else is needed, or shapes and dtypes.

    Returns:
        One truth value for each leaf, in flattening order; False where all individuals have the
        same numbers.

    Example:
        >>> parents = {"u": jax.numpy.ones((2, 3)), "v": jax.numpy.ones((2, 3))}
        >>> def express(genes, parents):
        ...     return {"u": parents["u"][0], "v": genes @ parents["v"]}
        >>> own_leaves(express, jax.numpy.ones(2), parents)
        [False, True]
    """
    return [bool(leaves) for leaves in dependences(trace(express, genes, context))]


def split(apply_fn: ApplyFn, variables: PyTree, inputs: Any, own: Sequence[bool]) -> Split | None:
    """Splits a network where its individuals begin to differ.

    Args:
        apply_fn: the network.
        variables: of one network, or their shapes and dtypes.
        inputs: one batch, or its shapes and dtypes.
        own: for each leaf whether individuals differ in it; see `own_leaves`.

    Returns:
        The two parts; None where the first would hold no contraction and nothing would be saved.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply_fn(w, x):
        ...     return jnp.tanh(x @ w["first"]) @ w["second"]
        >>> w, x = {"first": jnp.eye(2), "second": jnp.ones((2, 3))}, jnp.ones((4, 2))
        >>> parts = split(apply_fn, w, x, own=[False, True])
        >>> [feature.shape for feature in parts.first(w, x)]
        [(4, 2)]
        >>> bool((parts.rest(w, (x, parts.first(w, x))) == apply_fn(w, x)).all())
        True
    """
    if all(own) or not _border(trace(apply_fn, variables, inputs), tuple(own)):
        return None
    return Split(*(bind(part, apply_fn=apply_fn, own=tuple(own)) for part in (_first, _rest)))


class _Trait(NamedTuple):
    """Where a value comes from.

    Attributes:
        own: individuals differ in it.
        of_inputs: it depends on the inputs.
        contracted: a contraction of the inputs went into it.
        place: equation and output that it is the result of; None for arguments and constants.
    """

    own: bool = False
    of_inputs: bool = False
    contracted: bool = False
    place: tuple[int, int] | None = None


@functools.lru_cache(maxsize=64)
def _border(program: Program, own: tuple[bool, ...]) -> tuple[tuple[int, int], ...]:
    """The values at which individuals begin to differ; none if no contraction lies before them."""
    arguments = [_Trait(own=one) for one in own]
    arguments += [_Trait(of_inputs=True)] * (len(program.closed.jaxpr.invars) - len(own))
    border: dict[tuple[int, int], bool] = {}  # of each feature, whether a contraction is in it

    def use(trait: _Trait) -> None:
        if trait.place is not None and trait.of_inputs and not trait.own:
            border[trait.place] = trait.contracted

    def visit(number: int, equation: core.JaxprEqn, operands: Sequence[_Trait]) -> list[_Trait]:
        own = any(operand.own for operand in operands)
        of_inputs = any(operand.of_inputs for operand in operands)
        for operand in operands if own else ():
            use(operand)
        work = any(operand.contracted for operand in operands if operand.of_inputs)
        work |= of_inputs and equation.primitive.name in ("dot_general", "conv_general_dilated")
        outputs = range(len(equation.outvars))
        return [_Trait(own, of_inputs, work, (number, index)) for index in outputs]

    for result in walk(program.closed, arguments, visit, lambda constant: _Trait()):
        use(result)
    return tuple(sorted(border)) if any(border.values()) else ()


def _first(variables: PyTree, inputs: Any, *, apply_fn: ApplyFn, own: tuple[bool, ...]) -> Any:
    program = trace(apply_fn, variables, inputs)
    places = _border(program, own)
    found: dict[tuple[int, int], Delayed] = {}

    def keep(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
        outputs = delay(equation, operands)
        found.update({(number, index): output for index, output in enumerate(outputs)})
        return outputs

    values = map(known, jax.tree.leaves((variables, inputs)))
    walk(program.closed, list(values), keep, known, wanted={number for number, _ in places})
    return [found[place]() for place in places]


def _rest(variables: PyTree, inputs: Any, *, apply_fn: ApplyFn, own: tuple[bool, ...]) -> Any:
    inputs, features = inputs
    program = trace(apply_fn, variables, inputs)
    there = dict(zip(_border(program, own), map(known, features), strict=True))

    def replace(number: int, equation: core.JaxprEqn, operands: Sequence[Delayed]) -> Any:
        outputs = enumerate(delay(equation, operands))
        return [there.get((number, index), output) for index, output in outputs]

    wanted = {number for number, _ in there}
    return run(program, jax.tree.leaves(variables), inputs, replace, wanted)
